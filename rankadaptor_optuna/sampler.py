"""RankAdaptorSampler: Optuna's sampler contract over the performance model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.surrogate.encoding import Encoding
from rankadaptor_optuna.surrogate.features import Array, RankGrid
from rankadaptor_optuna.surrogate.model import Belief, PerformanceModel
from rankadaptor_optuna.surrogate.prior import Prior, load_prior
from rankadaptor_optuna.surrogate.search import solve_unseen

SPACE_ATTR = "rankadaptor:space"
_PROPOSAL_ATTR = "rankadaptor:proposal"
_MAX_REDRAWS = 10
_FIXED_PARAMS = "fixed_params"  # where Optuna keeps what enqueue_trial gave


class RankAdaptorSampler(BaseSampler):
    """Proposes per-layer ranks by Thompson sampling on a meta-learned performance model.

    With a ``space`` every proposal is within its budget, from the first trial on, and the first trial is the uniform
    configuration. Without one it works in any study: parameters whose names carry a layer number and whose values
    are ordered integers are treated as ranks along the depth, all others as ordinary parameters; it learns from the
    trials already there, whichever sampler made them.

    The sampler keeps no state that the storage does not have: the same seed and history give the same proposal in any
    process.

    Args:
        space: What to search. Default: whatever the study's trials have in common.
        prior: Meta-learned start of the performance model: ``"pretrained"`` (shipped), None, or a path.
        n_startup_trials: Until so many trials have finished, proposals are drawn from the model's prior.
        independent_sampler: Samples parameters outside the relative search space. Default: uniformly.
        seed: Seed of the proposals. Default: drawn from the system.

    Raises:
        ValueError: The prior cannot be read, or ``n_startup_trials`` is negative.
    """

    def __init__(
        self,
        space: RankSpace | None = None,
        *,
        prior: Prior | str | os.PathLike[str] | None = "pretrained",
        n_startup_trials: int = 2,
        independent_sampler: BaseSampler | None = None,
        seed: int | None = None,
    ) -> None:
        if n_startup_trials < 0:
            raise ValueError(f"n_startup_trials must be at least 0, got {n_startup_trials}.")
        self.space = space
        self.prior = prior if isinstance(prior, Prior) else load_prior(prior)
        self._n_startup_trials = n_startup_trials
        self._independent_sampler = independent_sampler
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self._grid = None if space is None else RankGrid.from_space(space)

    def reseed_rng(self) -> None:
        """Takes a fresh seed from the system, as Optuna's own samplers do."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        if self._independent_sampler is not None:
            self._independent_sampler.reseed_rng()

    def _rng(self, trial: FrozenTrial, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, trial.number, zlib.crc32(purpose.encode())])

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Stores the space with the study, so that ``recommend`` and other workers find it."""
        if self.space is not None and study.user_attrs.get(SPACE_ATTR) != (described := self.space.to_dict()):
            study.set_user_attr(SPACE_ATTR, described)
        if self._independent_sampler is not None:
            self._independent_sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Passes on to the independent sampler; the model itself is rebuilt from the storage."""
        if self._independent_sampler is not None:
            self._independent_sampler.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The space's ranks, and whatever the finished trials have in common."""
        known = IntersectionSearchSpace().calculate(study)
        common = {name: dist for name, dist in known.items() if not dist.single()}
        return common if self.space is None else {**common, **self.space.distributions()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One configuration: the uniform one first, then Thompson draws, each within the budget."""
        search_space = {name: dist for name, dist in search_space.items() if not dist.single()}
        ranked = self.space is not None and set(self.space.distributions()) <= set(search_space)
        if not search_space:
            return {}
        if ranked and self.space is not None:
            encoding = Encoding(search_space, self._grid, list(self.space.distributions()))
        else:
            encoding = Encoding(search_space)
        trials = study.get_trials(deepcopy=False)
        rng = self._rng(trial, "relative")
        belief, best_point = self._belief(study, trials, encoding, rng)
        params = encoding.decode(_best_point(encoding, belief, best_point, rng))
        if encoding.rank_names:
            params |= self._ranks(study, trial, trials, encoding, belief, rng, with_budget=ranked)
        return params

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401
        """Samples uniformly (or with the given sampler), reproducibly by trial and parameter."""
        sampler = self._independent_sampler
        if sampler is None:
            sampler = RandomSampler(seed=int(self._rng(trial, param_name).integers(2**32)))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _belief(
        self, study: Study, trials: list[FrozenTrial], encoding: Encoding, rng: np.random.Generator
    ) -> tuple[Belief, Array | None]:
        names = encoding.rank_names + encoding.ordinary_names
        finished = [
            t
            for t in trials
            if t.state is TrialState.COMPLETE
            and all(name in t.params for name in names)
            and np.isfinite(t.values).all()
        ]
        model = PerformanceModel(encoding.grid, prior=self.prior, n_ordinary=encoding.width)
        if len(finished) < max(1, self._n_startup_trials):
            return model.sample(rng), None
        scores = scalarised(np.asarray([t.values for t in finished]), study.directions, rng)
        points = np.asarray([encoding.point(t.params) for t in finished])
        model.update(np.asarray([encoding.ranks(t.params) for t in finished]), scores, points)
        return model.sample(rng), points[int(scores.argmax())]

    def _ranks(
        self,
        study: Study,
        trial: FrozenTrial,
        trials: list[FrozenTrial],
        encoding: Encoding,
        belief: Belief,
        rng: np.random.Generator,
        *,
        with_budget: bool,
    ) -> dict[str, int]:
        grid, names = encoding.grid, encoding.rank_names
        if with_budget and self.space is not None and self._uniform_is_missing(trial, trials):
            return {self.space.name(layer): rank for layer, rank in self.space.uniform().items()}
        values = grid.padded_values()
        table = belief.table.copy()
        for row, candidates in enumerate(grid.values):
            table[row, len(candidates) :] = -np.inf
        costs = values * grid.costs[:, None]
        budget = np.inf
        if with_budget and self.space is not None and self.space.budget is not None:
            budget = self.space.budget - self.space.fixed_cost
        for name, value in trial.system_attrs.get(_FIXED_PARAMS, {}).items():
            if name in names:  # enqueued in part: the other layers share what the given ranks leave
                row = names.index(name)
                table[row, values[row] != value] = -np.inf
        spent = np.where(np.isfinite(table), costs, np.inf).min(1).sum()
        seen = _seen(trial, trials, names, values)
        for _ in range(_MAX_REDRAWS):
            choice = solve_unseen(table, costs, max(budget, spent), seen, rng)
            key = tuple(choice.tolist())
            ranks = [int(rank) for rank in values[np.arange(len(values)), choice]]
            # announced before its parameters are stored one by one; of two workers with the same, the later redraws
            study._storage.set_trial_system_attr(trial._trial_id, _PROPOSAL_ATTR, ranks)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            earlier = [other for other in running if other.number < trial.number]
            if key in seen or key not in _seen(trial, earlier, names, values):
                break
            seen.add(key)
        return dict(zip(names, ranks, strict=True))

    def _uniform_is_missing(self, trial: FrozenTrial, trials: list[FrozenTrial]) -> bool:
        """Whether no trial is the uniform configuration, nor an earlier worker just about to be."""
        assert self.space is not None
        uniform = {self.space.name(layer): rank for layer, rank in self.space.uniform().items()}
        if trial.system_attrs.get(_FIXED_PARAMS):
            return False
        for other in trials:
            if other.number != trial.number and uniform.items() <= other.params.items():
                return False
            if other.number < trial.number and other.state is TrialState.RUNNING and not other.params:
                return False
        return True


def scalarised(values: Array, directions: Sequence[StudyDirection], rng: np.random.Generator) -> Array:
    """Scores where higher is better, (n,), of objective values (n, M).

    Several objectives are standardised and joined by an augmented Chebyshev function with random weights, drawn anew
    for each proposal, so that proposals spread over the front (ParEGO, Knowles 2006).
    """
    signs = np.asarray([1.0 if d is StudyDirection.MAXIMIZE else -1.0 for d in directions])
    scores: Array = values * signs
    if scores.shape[1] == 1:
        return scores[:, 0]
    spread = scores.std(0)
    scores = (scores - scores.mean(0)) / np.where(spread > 0, spread, 1)
    weights = rng.dirichlet(np.ones(scores.shape[1]))
    joined: Array = (weights * scores).min(1) + 0.05 * (weights * scores).sum(1)
    return joined


def _best_point(encoding: Encoding, belief: Belief, best: Array | None, rng: np.random.Generator) -> Array:
    points = encoding.random_points(512, rng)
    if encoding.width == 0:
        return points[0]
    if best is not None:
        points = np.concatenate([points, encoding.near(best, 128, rng)])
    incumbent: Array = points[belief.of_ordinary(points).argmax()]
    closer = np.concatenate([incumbent[None], encoding.near(incumbent, 128, rng)])
    point: Array = closer[belief.of_ordinary(closer).argmax()]
    return point


def _seen(trial: FrozenTrial, trials: list[FrozenTrial], names: list[str], values: Array) -> set[tuple[int, ...]]:
    """Configurations that other trials have tried, are running or have announced, as candidate indices."""
    seen = set()
    for other in trials:
        ranks = [other.params.get(name) for name in names]
        if None in ranks:
            ranks = other.system_attrs.get(_PROPOSAL_ATTR, [])
        if other.number == trial.number or other.state is TrialState.WAITING or len(ranks) != len(names):
            continue
        matches = values == np.asarray(ranks, dtype=np.float64)[:, None]
        if matches.any(1).all():
            seen.add(tuple(matches.argmax(1).tolist()))
    return seen
