"""The samplers that the benchmarks race, all under the same budget.

Optuna's samplers know no budget over a sum of parameters. They search the candidates' places, an integer a layer, and
what they propose is projected onto the budget (``projected``) before it is scored, so that each of their trials uses
the budget to the full, as RankAdaptor's do. Their first trial is the uniform configuration, as RankAdaptor's is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, TrialState

from rankadaptor_optuna import PerformanceModel, RankAdaptorSampler, RankSpace
from rankadaptor_optuna.surrogate.allocations import Allocations
from rankadaptor_optuna.surrogate.grid import Array, RankGrid

OURS = "RankAdaptor"
ALONE = f"{OURS}, scores alone"  # not told how sensitive the loss is to the layers' adapters
RIDGE = "ridge + TS"
PAPER = "paper's MLP"
PROPOSES_RANKS = (OURS, RIDGE, PAPER)  # the others propose candidates' places
SOURCE_ATTR = "source"  # of trials that were another task's
STATEFUL = ("CMA-ES",)  # keep more with their trials than parameters and value: a search that was stopped is replayed

Makers = Mapping[str, Callable[[RankSpace, int], BaseSampler]]  # samplers of a space and a seed, by name


def sampler_of(name: str) -> str:
    """The sampler of a competitor: what comes before the comma, as in "RankAdaptor, no prior"."""
    return name.partition(",")[0]


class _RankSampler(BaseSampler):
    """A sampler of rank configurations within the budget, from the finished trials alone."""

    def __init__(self, space: RankSpace, seed: int) -> None:
        self._space, self._seed = space, seed
        self._grid = RankGrid.from_space(space)

    def propose(self, ranks: Array, scores: Array, rng: np.random.Generator) -> Sequence[int]:
        """Ranks of the next trial, given the finished ones', (n, L), and their scores, (n,), higher is better."""
        raise NotImplementedError

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All ranks."""
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What ``propose`` says."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ranks = np.asarray([[t.params[name] for name in search_space] for t in done], dtype=np.float64)
        sign = -1.0 if study.direction is StudyDirection.MINIMIZE else 1.0
        scores = sign * np.asarray([t.values[0] for t in done], dtype=np.float64)
        rng = np.random.default_rng([self._seed, trial.number])
        return dict(zip(search_space, self.propose(ranks.reshape(-1, len(search_space)), scores, rng), strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401
        """There is nothing but ranks."""
        raise NotImplementedError


class RidgeThompsonSampler(_RankSampler):
    """Thompson sampling on a ridge regression of the score on each layer's log rank, inside the budget.

    The plain version of what RankAdaptor does: no depth, no curvature, no pruning profile, no prior knowledge.
    """

    def propose(self, ranks: Array, scores: Array, rng: np.random.Generator) -> Sequence[int]:
        """The optimum of a draw from the posterior."""
        x, y = self._grid.scaled(ranks), scores
        y = (y - y.mean()) / (y.std() or 1.0) if len(y) else y
        noise, scale = 0.3, 1 / np.sqrt(self._grid.n_layers)
        covariance = np.linalg.inv(np.eye(self._grid.n_layers) / scale**2 + x.T @ x / noise**2)
        weights = rng.multivariate_normal(covariance @ x.T @ y / noise**2, covariance)
        budget = None if self._space.budget is None else self._space.budget - self._space.fixed_cost
        allocations = Allocations.of(self._grid, budget)
        table = weights[:, None] * self._grid.scaled(allocations.ranks.T).T
        return allocations.ranks_of(allocations.best(table))


class PaperSampler(_RankSampler):
    """The paper's search: its MLP, trained online, chooses among many random configurations that use the budget.

    Without its offline phase, as no competitor has seen other tasks.
    """

    def propose(self, ranks: Array, scores: Array, rng: np.random.Generator) -> Sequence[int]:
        """The best prediction among the untried of 20,000 random configurations that are within the budget."""
        model = PerformanceModel(self._space, mode="paper", prior=None, seed=self._seed)
        if len(scores):
            model.update(ranks, scores)
        random = rng.choice(self._space.candidates, size=(20_000, self._grid.n_layers))
        if self._space.budget is not None:
            share = (random @ self._grid.costs + self._space.fixed_cost) / self._space.budget
            inside = np.flatnonzero(share <= 1)
            random = random[inside[np.argsort(-share[inside])[: max(1, len(inside) // 4)]]]  # those that use it most
        tried = {tuple(row) for row in ranks.astype(int).tolist()}
        predicted = model.predict(random)[0]
        best = next(i for i in np.argsort(-predicted) if tuple(random[i].tolist()) not in tried)
        return [int(rank) for rank in random[best]]


@cache
def samplers() -> Makers:
    """The competitors by name, each made from a space and a seed; AutoSampler only where OptunaHub is reachable."""
    known = {
        OURS: lambda space, seed: RankAdaptorSampler(space, prior=None, seed=seed),
        "TPE": lambda _, seed: TPESampler(seed=seed),
        "GP": lambda _, seed: GPSampler(seed=seed),
        "CMA-ES": lambda _, seed: CmaEsSampler(seed=seed),
        RIDGE: RidgeThompsonSampler,
        PAPER: PaperSampler,
        "Random": lambda _, seed: RandomSampler(seed=seed),
    }
    try:
        import optunahub  # type: ignore[import-not-found]

        module = optunahub.load_module("samplers/auto_sampler")
        known["AutoSampler"] = lambda _, seed: module.AutoSampler(seed=seed)
    except Exception as error:  # not installed, no network, no such registry: all the same here
        warnings.warn(f"AutoSampler is left out: OptunaHub gave {type(error).__name__}.", stacklevel=2)
    return known


def open_study(
    name: str,
    space: RankSpace,
    seed: int,
    known: Sequence[Sequence[int]] = (),
    loss: Callable[[dict[int, int]], float] | None = None,
    storage: BaseStorage | None = None,
    study_name: str | None = None,
    makers: Makers | None = None,
    source: Sequence[tuple[Mapping[int, int], float]] = (),
) -> Study:
    """A study that minimises, with the sampler ``name``, which goes on after the trials that are known.

    Args:
        name: Of the sampler.
        space: The rank space.
        seed: Of the sampler.
        known: Parameters of its trials so far, in the order of the layers.
        loss: Their loss, by configuration.
        storage: Default: in memory.
        study_name: Default: Optuna's.
        makers: The samplers by name. Default: ``samplers()``.
        source: Configurations and losses of other tasks' trials, which come first, with ``SOURCE_ATTR``; for samplers
            that propose places.
    """
    study = optuna.create_study(storage=storage, study_name=study_name, direction="minimize")
    distributions = dict(space.distributions())
    if sampler_of(name) not in PROPOSES_RANKS:
        distributions = dict.fromkeys(distributions, IntDistribution(0, len(space.candidates) - 1))
    for ranks, value in source:
        params = {space.name(layer): space.candidates.index(rank) for layer, rank in ranks.items()}
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=value, user_attrs={SOURCE_ATTR: True})
        )
    for values in known:
        params = dict(zip(distributions, values, strict=True))
        assert loss is not None
        value = loss(ranks_of(name, space, FixedTrial(params)))
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
    # one that goes on must not repeat its first draws
    study.sampler = (makers or samplers())[name](space, seed + 1000 * len(known))
    if not known and sampler_of(name) != OURS:
        uniform = {space.name(layer): rank for layer, rank in space.uniform().items()}
        if sampler_of(name) not in PROPOSES_RANKS:
            uniform = {key: space.candidates.index(rank) for key, rank in uniform.items()}
        study.enqueue_trial(uniform)
    return study


def ranks_of(name: str, space: RankSpace, trial: BaseTrial) -> dict[int, int]:
    """The configuration that a trial of the sampler ``name`` stands for."""
    if sampler_of(name) in PROPOSES_RANKS:
        return space.suggest(trial)
    last = len(space.candidates) - 1
    return projected(space, {i: space.candidates[trial.suggest_int(space.name(i), 0, last)] for i in space.layers})


def projected(space: RankSpace, ranks: Mapping[int, int]) -> dict[int, int]:
    """The configuration closest in shape to ``ranks`` that uses the budget.

    All ranks are shifted alike, in log rank, where the candidates' ratios matter, by the largest shift whose rounded
    result is within the budget. What that leaves of the budget raises single layers by a candidate as long as one fits,
    those first that rounding keeps furthest below what was wanted.
    """
    if space.budget is None:
        return dict(ranks)
    steps = np.log2(1 + np.asarray(space.candidates, dtype=np.float64))
    costs = np.asarray(space.costs)[:, None] * np.asarray(space.candidates)
    wanted = np.log2(1 + np.asarray([ranks[layer] for layer in space.layers], dtype=np.float64))
    rows = np.arange(len(wanted))

    def at(shift: float) -> np.ndarray[Any, np.dtype[np.intp]]:
        return np.abs(steps - (wanted + shift)[:, None]).argmin(1)

    low, high = -float(steps[-1]) - 1, float(steps[-1]) + 1
    for _ in range(40):
        middle = (low + high) / 2
        fits = costs[rows, at(middle)].sum() + space.fixed_cost <= space.budget
        low, high = (middle, high) if fits else (low, middle)
    chosen = at(low)
    while True:
        higher = np.minimum(chosen + 1, len(steps) - 1)
        left = space.budget - space.fixed_cost - costs[rows, chosen].sum()
        fitting = np.flatnonzero((higher > chosen) & (costs[rows, higher] - costs[rows, chosen] <= left))
        if not len(fitting):
            return {layer: space.candidates[i] for layer, i in zip(space.layers, chosen, strict=True)}
        chosen[fitting[(wanted + low - steps[chosen])[fitting].argmax()]] += 1
