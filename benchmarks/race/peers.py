"""The samplers that the benchmarks race, all under the same budget.

Optuna's samplers know no budget over a sum of parameters. They search an integer per layer, the place in the list of
candidates, and their proposals are projected onto the budget (``projected``) before they are scored, so that each
trial uses the budget to the full, as RankAdaptor's do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from rankadaptor_optuna import PerformanceModel, RankAdaptorSampler, RankSpace
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.surrogate.allocations import Allocations
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.prior import Prior

OURS = "RankAdaptor"
ALONE = f"{OURS}, scores alone"  # not told the layers' sensitivities
RIDGE = "ridge + TS"
PAPER = "paper's MLP"
PROPOSES_RANKS = (OURS, RIDGE, PAPER)  # the others propose places in the list of candidates

Maker = Callable[[RankSpace, int], BaseSampler]  # makes a sampler for a space, with a seed


def sampler_of(name: str) -> str:
    """Returns the sampler of a competitor: the part before the comma of "RankAdaptor, no prior"."""
    return name.partition(",")[0]


class _RankSampler(BaseSampler):
    """A sampler that proposes rank configurations within the budget from the finished trials alone."""

    def __init__(self, space: RankSpace, seed: int) -> None:
        self._space, self._seed = space, seed
        self._grid = RankGrid.from_space(space)

    def propose(self, ranks: Array, scores: Array, rng: np.random.Generator) -> Sequence[int]:
        """Returns the next trial's ranks, given the finished trials' ranks, (n, L), and scores, (n,), high is good."""
        raise NotImplementedError

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns all ranks."""
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns the ranks that ``propose`` proposes."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ranks = np.asarray([[t.params[name] for name in search_space] for t in done], dtype=np.float64)
        sign = -1.0 if study.direction is StudyDirection.MINIMIZE else 1.0
        scores = sign * np.asarray([t.values[0] for t in done], dtype=np.float64)
        rng = np.random.default_rng([self._seed, trial.number])
        return dict(zip(search_space, self.propose(ranks.reshape(-1, len(search_space)), scores, rng), strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401
        """Not used: the search space holds ranks only."""
        raise NotImplementedError


class RidgeThompsonSampler(_RankSampler):
    """Thompson sampling on a ridge regression of the score on each layer's log rank, inside the budget.

    RankAdaptor in its plainest form: no depth, no curvature, no pruning profile, no prior. Noise and scale of the
    prior are set by hand.
    """

    def propose(self, ranks: Array, scores: Array, rng: np.random.Generator) -> Sequence[int]:
        """Returns the optimum of a draw from the posterior."""
        x, y = self._grid.scaled(ranks), scores
        y = (y - y.mean()) / (y.std() or 1.0) if len(y) else y
        noise, scale = 0.3, 1 / np.sqrt(self._grid.n_layers)
        covariance = np.linalg.inv(np.eye(self._grid.n_layers) / scale**2 + x.T @ x / noise**2)
        weights = rng.multivariate_normal(covariance @ x.T @ y / noise**2, covariance)
        allocations = Allocations.of(self._grid, self._space.searched_budget)
        table = weights[:, None] * self._grid.scaled(allocations.ranks.T).T
        return allocations.ranks_of(allocations.best(table))


class PaperSampler(_RankSampler):
    """The paper's search: its MLP, trained online, chooses among random configurations that use the budget.

    Without the paper's offline phase, as no competitor has seen other tasks.
    """

    def propose(self, ranks: Array, scores: Array, rng: np.random.Generator) -> Sequence[int]:
        """Returns the best prediction among the untried of 20,000 random configurations within the budget."""
        model = PerformanceModel(self._space, mode="paper", prior=None, seed=self._seed)
        if len(scores):
            model.update(ranks, scores)
        random = rng.choice(self._space.candidates, size=(20_000, self._grid.n_layers))
        if self._space.budget is not None:
            share = random @ self._grid.costs / self._space.searched_budget
            inside = np.flatnonzero(share <= 1)
            random = random[inside[np.argsort(-share[inside])[: max(1, len(inside) // 4)]]]  # those that use it most
        tried = {tuple(row) for row in ranks.astype(int).tolist()}
        predicted = model.predict(random)[0]
        best = next(i for i in np.argsort(-predicted) if tuple(random[i].tolist()) not in tried)
        return [int(rank) for rank in random[best]]


def ours(prior: Prior | None) -> Maker:
    """Returns the maker of a ``RankAdaptorSampler`` with a prior."""
    return lambda space, seed: RankAdaptorSampler(space, prior=prior, seed=seed)


@cache
def samplers() -> Mapping[str, Maker]:
    """Returns the makers of the competitors by name; AutoSampler only where OptunaHub is reachable."""
    known: dict[str, Maker] = {
        OURS: ours(None),
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
    except Exception as error:  # not installed, or no network: both leave it out
        warnings.warn(f"AutoSampler is left out: OptunaHub gave {type(error).__name__}.", stacklevel=2)
    return known


def distributions_of(name: str, space: RankSpace) -> dict[str, BaseDistribution]:
    """Returns the parameters that the sampler ``name`` searches: ranks, or places in the list of candidates."""
    distributions = space.distributions()
    if sampler_of(name) in PROPOSES_RANKS:
        return distributions
    return dict.fromkeys(distributions, IntDistribution(0, len(space.candidates) - 1))


def params_of(name: str, space: RankSpace, ranks: Mapping[Any, int]) -> dict[str, int]:
    """Returns the parameters with which the sampler ``name`` proposes a configuration."""
    proposes_ranks = sampler_of(name) in PROPOSES_RANKS
    return {space.name(i): rank if proposes_ranks else space.candidates.index(rank) for i, rank in ranks.items()}


def ranks_of(name: str, space: RankSpace, trial: BaseTrial) -> Ranks:
    """Returns the configuration that a trial of the sampler ``name`` stands for."""
    if sampler_of(name) in PROPOSES_RANKS:
        return space.suggest(trial)
    last = len(space.candidates) - 1
    return projected(space, {i: space.candidates[trial.suggest_int(space.name(i), 0, last)] for i in space.layers})


def projected(space: RankSpace, ranks: Mapping[Any, float]) -> Ranks:
    """Returns the configuration closest in shape to ``ranks`` that uses the budget.

    All log ranks are shifted alike, by the largest shift whose rounded result is within the budget. The rest of the
    budget raises single layers by one candidate as long as one fits, the layer furthest below its wanted rank first.
    """
    if space.budget is None:
        return Ranks(ranks)
    steps = np.log2(1 + np.asarray(space.candidates, dtype=np.float64))
    costs = np.asarray(space.costs)[:, None] * np.asarray(space.candidates)
    wanted = np.log2(1 + np.asarray([ranks[layer] for layer in space.layers], dtype=np.float64))
    rows = np.arange(len(wanted))

    def at(shift: float) -> np.ndarray[Any, np.dtype[np.intp]]:
        return np.abs(steps - (wanted + shift)[:, None]).argmin(1)

    low, high = -float(steps[-1]) - 1, float(steps[-1]) + 1
    for _ in range(40):
        middle = (low + high) / 2
        fits = costs[rows, at(middle)].sum() <= space.searched_budget
        low, high = (middle, high) if fits else (low, middle)
    chosen = at(low)
    while True:
        higher = np.minimum(chosen + 1, len(steps) - 1)
        left = space.searched_budget - costs[rows, chosen].sum()
        fitting = np.flatnonzero((higher > chosen) & (costs[rows, higher] - costs[rows, chosen] <= left))
        if not len(fitting):
            return Ranks({layer: space.candidates[i] for layer, i in zip(space.layers, chosen, strict=True)})
        chosen[fitting[(wanted + low - steps[chosen])[fitting].argmax()]] += 1
