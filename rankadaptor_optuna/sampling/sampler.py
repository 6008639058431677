"""RankAdaptorSampler: Optuna's sampler contract over the performance model."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.attributes import PRIOR_ATTR, PROPOSAL_ATTR, SPACE_ATTR
from rankadaptor_optuna.priors.choice import OnBadPrior, PriorChoice, PriorLike
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.history import EncodedTrials, History, announced
from rankadaptor_optuna.space import BUDGET, RankSpace
from rankadaptor_optuna.surrogate.allocations import Allocations, within_constraints
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.prior import Prior

_MAX_REDRAWS = 10
_DRAWS = 4
_FIXED_PARAMS_OF_SAMPLER = "_fixed_params"  # of PartialFixedSampler
_FIXED_PARAMS = "fixed_params"  # where Optuna keeps what enqueue_trial gave


class RankAdaptorSampler(BaseSampler):
    """Proposes per-layer ranks by Thompson sampling on a meta-learned performance model.

    Of a few draws' optima it proposes the one that the model knows least about.

    With a ``space`` every proposal is within its budget, from the first trial on, and the first trial is the uniform
    configuration. Without one it works in any study: parameters whose names carry a layer number and whose values
    are ordered integers are treated as ranks along the depth, all others as ordinary parameters; it learns from the
    trials already there, whichever sampler made them.

    The sampler keeps no state that the storage does not have: the same seed and history give the same proposal in any
    process.

    Args:
        space: What to search. Default: whatever the study's trials have in common.
        prior: Meta-learned start of the performance model: ``"pretrained"`` (shipped), None, a path, or ``"db:NAME"``
            or ``"db:NAME@VERSION"``, which ``rankadaptor meta-train`` learned. A study keeps the one that it began
            with, to its version, whoever resumes it.
        n_startup_trials: Until so many trials have finished, proposals are drawn from the model's prior.
        independent_sampler: Samples parameters outside the relative search space. Default: uniformly.
        seed: Seed of the proposals. Default: drawn from the system.
        prior_storage: URL of the database that holds ``db:`` priors. Default: that of the study's own storage, which
            gRPC, journal and in-memory storages have not.
        on_bad_prior: What to do about a prior that is missing, corrupt or of a newer format: ``"raise"``, or go on
            with the ``"pretrained"`` one, and a warning; the study then keeps that.

    Raises:
        ValueError: The prior cannot be read (a ``db:`` prior: at the first trial), or ``n_startup_trials`` is negative.
    """

    def __init__(
        self,
        space: RankSpace | None = None,
        *,
        prior: PriorLike = "pretrained",
        n_startup_trials: int = 2,
        independent_sampler: BaseSampler | None = None,
        seed: int | None = None,
        prior_storage: str | None = None,
        on_bad_prior: OnBadPrior = "raise",
    ) -> None:
        if n_startup_trials < 0:
            raise ValueError(f"n_startup_trials must be at least 0, got {n_startup_trials}.")
        self.space = space
        if not isinstance(prior, PriorChoice):
            prior = PriorChoice(prior, storage=prior_storage, on_bad=on_bad_prior)
        self.prior = prior
        self._settled: dict[tuple[int, int], Prior | None] = {}  # of each study, by storage and id
        self._n_startup_trials = n_startup_trials
        self._independent_sampler = independent_sampler
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self._grid = None if space is None else RankGrid.from_space(space)
        self._cached: History | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the storage has anyway."""
        return {**self.__dict__, "_cached": None, "_settled": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled sampler."""
        self.__dict__.update(state, _lock=threading.RLock())

    def reseed_rng(self) -> None:
        """Takes a fresh seed from the system, as Optuna's own samplers do."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        if self._independent_sampler is not None:
            self._independent_sampler.reseed_rng()

    def _rng(self, trial: FrozenTrial, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, trial.number, zlib.crc32(purpose.encode())])

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Stores space and prior with the study, so that ``recommend`` and other workers find them."""
        # by the storage: under Hyperband, Optuna hides a study's attributes
        stored = study._storage.get_study_user_attrs(study._study_id)
        if self.space is not None and stored.get(SPACE_ATTR) != (described := self.space.to_dict()):
            study._storage.set_study_user_attr(study._study_id, SPACE_ATTR, described)
        try:
            with self._lock:
                self._settle(study, stored.get(PRIOR_ATTR))
        except ValueError:  # Optuna would leave the trial running
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            raise
        if self._independent_sampler is not None:
            self._independent_sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Passes on to the independent sampler; the model itself is rebuilt from the storage."""
        if self._independent_sampler is not None:
            self._independent_sampler.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The space's ranks, and whatever the completed trials have in common, in its latest range."""
        with self._lock:
            common = self._history(study).searched
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
        with self._lock:
            prior, history = self._prior_of(study), self._history(study)
        if ranked:
            encoding = Encoding({**ranks, **search_space}, self._grid, list(ranks), history.sensitivity)
        else:
            encoding = Encoding(search_space, sensitivity=history.sensitivity)
        rng = self._rng(trial, "relative")
        given: dict[str, Any] = {}
        if encoding.rank_names:
            given = {name: grid[-1] for name, grid in zip(encoding.rank_names, encoding.grid.values, strict=True)}
            given = {name: rank for name, rank in given.items() if name not in search_space}  # at its dearest
            given |= getattr(study.sampler, _FIXED_PARAMS_OF_SAMPLER, {}) | trial.system_attrs.get(_FIXED_PARAMS, {})
            given |= trial.params  # has some already where its worker was killed and it is run again
        rows = {row: given[name] for row, name in enumerate(encoding.rank_names) if name in given}
        with self._lock:
            trials = history.encoded(encoding, lambda encoding: self._new_model(encoding, prior))
            allocations = Allocations.of(encoding.grid, self._budget(encoding), rows)
            table, params = self._draw(study, trials, allocations, rng)
            if encoding.rank_names:
                wants_uniform = encoding.is_given and not rows
                chosen = self._announce(study, trial, history, trials, allocations, table, wants_uniform, rng)
                params |= dict(zip(encoding.rank_names, chosen, strict=True))
        return {name: value for name, value in params.items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401
        """Samples uniformly (or with the given sampler), reproducibly by trial and parameter."""
        sampler = self._independent_sampler
        if sampler is None:
            sampler = RandomSampler(seed=int(self._rng(trial, param_name).integers(2**32)))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _history(self, study: Study) -> History:
        if self._cached is None or not self._cached.is_of(study):
            self._cached = History(study)
        self._cached.refresh()
        return self._cached

    def _settle(self, study: Study, stored: str | None) -> None:
        key, prior = (id(study._storage), study._study_id), self.prior.settle(study, stored)
        if self._settled.get(key, prior) is not prior:
            self._cached = None  # encoded trials hold the prior's features
        self._settled[key] = prior

    def _prior_of(self, study: Study) -> Prior | None:
        key = id(study._storage), study._study_id
        if key not in self._settled:  # another sampler wraps this one, and does not tell it of a trial's beginning
            self._settle(study, study._storage.get_study_user_attrs(study._study_id).get(PRIOR_ATTR))
        return self._settled[key]

    def _new_model(self, encoding: Encoding, prior: Prior | None = None) -> BayesianModel:
        return BayesianModel(encoding.grid, prior=prior, n_ordinary=encoding.width)

    def _budget(self, encoding: Encoding) -> float:
        return math.inf if self.space is None or not encoding.is_given else self.space.searched_budget

    def _draw(
        self, study: Study, trials: EncodedTrials, allocations: Allocations, rng: np.random.Generator
    ) -> tuple[Array, dict[str, Any]]:
        """A Thompson draw of each candidate rank's value, (L, C), and the other parameters that are best by it.

        Of a few draws, that whose optimum the model knows least about: the answer of a study is what its model
        recommends, not its best trial, so it is knowledge near the optimum that counts.

        The draw is penalised until its optimum is expected to keep all constraints, which are functions of the same
        features, by a margin (in units of their size) where the latest proposals did not.
        """
        encoding, model, data = trials.encoding, trials.model, trials.data()
        incumbent, constraints, margin = None, [], 0.0
        if len(data.trials) < max(1, self._n_startup_trials):
            model.fit(data.rows[:0], np.zeros(0))
        else:
            scores = scalarised(data.values, study.directions, rng)
            model.fit(data.rows, scores, data.variance)
            best = int(np.where(data.feasible, scores, scores.min()).argmax())
            incumbent = np.asarray(encoding.point(data.trials[best].params))
            margin = data.margin
            held = {BUDGET} if self._budget(encoding) < math.inf else set()
            given = trials.constraints()
            constraints = [model.constraint(*given[name]) for name in given if name not in held]

        def point_of(belief: Belief) -> Array:
            return _best_point(encoding, belief, incumbent, rng)

        drawn = [
            within_constraints(model.sample(rng), constraints, allocations, point_of, margin) for _ in range(_DRAWS)
        ]
        ranks = np.asarray([allocations.ranks_of(choice) for _, choice, _ in drawn])
        rows = model.encode(ranks, np.asarray([point for _, _, point in drawn]))
        _, uncertainty = model.predict_difference(rows, model.encode(encoding.grid.reference))
        belief, _, point = drawn[int(uncertainty.argmax())]
        return belief.table, encoding.decode(point)

    def _announce(
        self,
        study: Study,
        trial: FrozenTrial,
        history: History,
        trials: EncodedTrials,
        allocations: Allocations,
        table: Array,
        wants_uniform: bool,
        rng: np.random.Generator,
    ) -> tuple[int, ...]:
        """The uniform ranks first, else the best by ``table`` that no other trial has."""
        names = trials.encoding.rank_names
        uniform = tuple(int(rank) for rank in trials.encoding.grid.reference)
        others = [t for t in history.unfinished if t.number != trial.number and t.state is TrialState.RUNNING]
        running = {announced(t, names) for t in others}
        if wants_uniform:
            ended = trials.tried.get(uniform, [])  # a uniform trial that failed is tried once more
            about_to_be = any(announced(t, names) is None for t in others if t.number < trial.number)
            missing = uniform not in running and ended in ([], [TrialState.FAIL])
            wants_uniform = missing and not about_to_be

        def is_seen(ranks: tuple[int, ...]) -> bool:
            return ranks in running or ranks in trials.tried

        for _ in range(_MAX_REDRAWS):
            ranks = uniform if wants_uniform else allocations.ranks_of(allocations.best_unseen(table, is_seen, rng))
            known = is_seen(ranks)
            # announced before the parameters are stored one by one, so that concurrent workers see it; of two with
            # the same one the later draws again (both do where both see it), but uniform stays with the earlier
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL_ATTR, list(ranks))
            history.refresh()
            trials.take(history.finished)
            rivals = {
                announced(t, names)
                for t in history.unfinished
                if t.state is TrialState.RUNNING and t.number != trial.number
                if t.number < trial.number or not wants_uniform
            }
            if known or not (ranks in rivals or ranks in trials.tried):
                break
            running.add(ranks)
            wants_uniform = False
        return ranks


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
