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
_FIXED_PARAMS_OF_SAMPLER = "_fixed_params"  # of PartialFixedSampler
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
        if not search_space:
            return {}
        ranks = {} if self.space is None else self.space.distributions()
        ranked = not ranks.keys().isdisjoint(search_space)
        # PartialFixedSampler takes its names out of the search space; their ranks still cost
        encoding = Encoding({**ranks, **search_space}, self._grid, list(ranks)) if ranked else Encoding(search_space)
        trials = study.get_trials(deepcopy=False)
        rng = self._rng(trial, "relative")
        belief, best_point = self._belief(study, trials, encoding, rng)
        params = encoding.decode(_best_point(encoding, belief, best_point, rng))
        if encoding.rank_names:
            given = {name: grid[-1] for name, grid in zip(encoding.rank_names, encoding.grid.values, strict=True)}
            given = {name: rank for name, rank in given.items() if name not in search_space}  # at its dearest
            given |= getattr(study.sampler, _FIXED_PARAMS_OF_SAMPLER, {}) | trial.system_attrs.get(_FIXED_PARAMS, {})
            params |= self._ranks(study, trial, trials, encoding, belief, given, rng)
        return {name: value for name, value in params.items() if name in search_space}

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
        given: dict[str, Any],
        rng: np.random.Generator,
    ) -> dict[str, int]:
        """Ranks by name: the uniform ones first, else the best by ``belief`` that no other trial has."""
        grid, names = encoding.grid, encoding.rank_names
        values, table = grid.padded_values(), belief.table.copy()
        costs = values * grid.costs[:, None]
        for row, candidates in enumerate(grid.values):
            table[row, len(candidates) :] = -np.inf
            if (rank := given.get(names[row])) is not None:  # the other layers share what it leaves of the budget
                values[row], costs[row] = rank, rank * grid.costs[row]
                table[row, 1:] = -np.inf
        budget = np.inf
        if grid is self._grid and self.space is not None and self.space.budget is not None:
            budget = self.space.budget - self.space.fixed_cost
        budget = max(budget, np.where(np.isfinite(table), costs, np.inf).min(1).sum())
        rows = np.arange(len(names))
        seen = set(_announced(trial, trials, names))
        wants_uniform = grid is self._grid and not given and self._uniform_is_missing(trial, trials, names)
        for _ in range(_MAX_REDRAWS):
            if wants_uniform:
                ranks = tuple(int(rank) for rank in grid.reference)
            else:
                seen_choices = {c for c in (_choice(ranks, values) for ranks in seen) if c is not None}
                ranks = tuple(int(r) for r in values[rows, solve_unseen(table, costs, budget, seen_choices, rng)])
            # announced before the parameters are stored one by one, so that concurrent workers see it; of two with
            # the same one the later draws again (both do where both see it), but uniform stays with the earlier
            study._storage.set_trial_system_attr(trial._trial_id, _PROPOSAL_ATTR, list(ranks))
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            rivals = [t for t in running if t.number < trial.number] if wants_uniform else running
            if ranks in seen or ranks not in _announced(trial, rivals, names):
                break
            seen.add(ranks)
            wants_uniform = False
        return dict(zip(names, ranks, strict=True))

    def _uniform_is_missing(self, trial: FrozenTrial, trials: list[FrozenTrial], names: list[str]) -> bool:
        """Whether no trial is the uniform configuration; one that failed is tried once more."""
        uniform = tuple(int(rank) for rank in self._grid.reference) if self._grid is not None else ()
        failed = 0
        for other in trials:
            if other.number == trial.number:
                continue
            found = _announced(trial, [other], names)
            if other.number < trial.number and other.state is TrialState.RUNNING and not found:
                return False  # a worker that is just about to be
            if uniform in found and other.state is TrialState.FAIL:
                failed += 1
            elif uniform in found:
                return False
        return failed < 2


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


def _announced(trial: FrozenTrial, others: list[FrozenTrial], names: list[str]) -> list[tuple[int, ...]]:
    """Rank configurations that other trials have tried, are running or have announced."""
    found = []
    for other in others:
        ranks: list[Any] = [other.params.get(name) for name in names]
        if None in ranks:
            ranks = other.system_attrs.get(_PROPOSAL_ATTR, [])
        if other.number != trial.number and other.state is not TrialState.WAITING and len(ranks) == len(names):
            found.append(tuple(ranks))
    return found


def _choice(ranks: tuple[int, ...], values: Array) -> tuple[int, ...] | None:
    """Candidate index of each rank; None where one is not a candidate (any more)."""
    matches = values == np.asarray(ranks, dtype=np.float64)[:, None]
    return tuple(matches.argmax(1).tolist()) if matches.any(1).all() else None
