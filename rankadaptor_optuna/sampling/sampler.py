"""RankAdaptorSampler: Optuna's sampler contract over the performance model."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.database.attributes import RANKS_ATTR, SPACE_ATTR, identity_of
from rankadaptor_optuna.priors.choice import OnBadPrior, PriorChoice, PriorLike
from rankadaptor_optuna.sampling.announcement import Announcer
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.sampling.observations import EncodedTrials
from rankadaptor_optuna.sampling.rank_parameters import checked_templates, rank_template, why_no_ranks
from rankadaptor_optuna.sampling.remainder import remaining_space, sample_remainder, tpe
from rankadaptor_optuna.sampling.scalarisation import scalarised
from rankadaptor_optuna.sampling.trials import planned_params
from rankadaptor_optuna.space import BUDGET, RankSpace
from rankadaptor_optuna.surrogate.allocations import Allocations, Points, within_constraints
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.features import ordinary_features
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.prior import Prior

# Thompson draws of which the one with the least known optimum is taken. Together with a stronger trend in rank it took
# the normalised regret of recommendations after 25 trials on development tasks from .19 (one draw) to .14.
_N_DRAWS = 4
_N_RANDOM = 512  # random points of the ordinary parameters tried for each draw; set by hand
_N_NEAR = 128  # points tried near the best trial's point, and near the best point so far; set by hand
_RISK = 0.15  # highest probability of failing of a proposal; 0.3 has 1.6 times the failures in benchmarks.failures
_logger = optuna.logging.get_logger(f"optuna.{__name__}")  # below Optuna's own logger, to follow its verbosity
_FIXED_PARAMS_OF_SAMPLER = "_fixed_params"  # attribute of Optuna's PartialFixedSampler


class RankAdaptorSampler(BaseSampler):
    """Proposes per-layer ranks by Thompson sampling on a meta-learned performance model.

    Of the optima of a few draws it proposes the one that the model knows least about.

    With a ``space`` every proposal is within its budget, from the first trial on, and the first trial is the uniform
    configuration. Without a space it works in any study: the parameters that ``ranks`` declares, or whose names say so
    (``layer_3_rank``, ``lora_r_3``), are ranks along the depth. It learns from the existing trials, whichever sampler
    proposed them. Parameters that all recent trials with these ranks have are searched together with the ranks, but for
    those that decide whether a trial has ranks at all; the rest is left to ``independent_sampler``.

    The sampler keeps no state that the storage does not have: the same seed and history give the same proposal in any
    process.

    Args:
        space: The rank space. Default: the parameters of recent trials.
        ranks: Templates of the rank parameters' names, each with ``{}`` for the layer number, where there is no space:
            ``"layer_{}_r"``, or a list of them; ``()`` for no ranks. The study keeps them for ``recommend``. Default:
            three or more parameters with integer values whose names differ by a number only, and contain "rank" or "r"
            as a word.
        prior: Meta-learned start of the performance model: ``"pretrained"`` (shipped), None, a path, or ``"db:NAME"``
            or ``"db:NAME@VERSION"``, learned by ``rankadaptor meta-train``. A study keeps the prior that it began
            with, in that version, whoever resumes it.
        n_startup_trials: Number of trials with a value before which proposals are drawn from the model's prior; 0 acts
            as 1. With a space the first trial is uniform in any case.
        independent_sampler: Samples parameters that are not searched with the ranks. Default: Optuna's ``TPESampler``.
        seed: Seed of the proposals. Default: drawn from the system.
        prior_storage: URL of the database that holds ``db:`` priors. Default: the database of the study's storage, not
            available with gRPC, journal and in-memory storages.
        on_bad_prior: Reaction to a prior that is missing, corrupt or of a newer format: ``"raise"``, or
            ``"pretrained"``: warn and go on with the shipped prior, in this process only. A database that cannot be
            reached raises in any case.
        warn_independent_sampling: Whether to log a warning, once for each parameter, when a parameter of a study with
            finished trials is not searched with the ranks.

    Attributes:
        space: The rank space, or None.
        ranks: The templates of the rank parameters' names, or None.
        prior: The prior as it was given.

    Raises:
        ValueError: An argument is out of range, or the prior cannot be read (a ``db:`` prior: at the first trial).
    """

    def __init__(
        self,
        space: RankSpace | None = None,
        *,
        ranks: str | Sequence[str] | None = None,
        prior: PriorLike = "pretrained",
        n_startup_trials: int = 2,
        independent_sampler: BaseSampler | None = None,
        seed: int | None = None,
        prior_storage: str | None = None,
        on_bad_prior: OnBadPrior = "raise",
        warn_independent_sampling: bool = True,
    ) -> None:
        for name, value in (("n_startup_trials", n_startup_trials), ("seed", 0 if seed is None else seed)):
            if not isinstance(value, (int, np.integer)) or value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}; give an integer.")
        if space is not None and not isinstance(space, RankSpace):
            raise ValueError(f"space must be a RankSpace, got {space!r}; a budget is RankSpace(n_layers, budget=...).")
        if space is not None and ranks is not None:
            raise ValueError("give a space, which names its ranks (RankSpace(..., name=...)), or ranks, not both.")
        self.space, self.ranks = space, checked_templates(ranks)
        if not isinstance(prior, PriorChoice):
            prior = PriorChoice(prior, storage=prior_storage, on_bad=on_bad_prior)
        self.prior = prior
        self._settled: dict[tuple[int, int], Prior | None] = {}  # each study's prior, by storage and study id
        self._n_startup_trials = n_startup_trials
        self._independent_sampler = independent_sampler
        self._warns_of_independent = warn_independent_sampling
        self._said: set[Any] = set()  # of messages that are given once
        self._seed = _fresh_seed() if seed is None else int(seed)
        self._cached: History | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the state that is rebuilt from the storage."""
        return {**self.__dict__, "_cached": None, "_settled": {}, "_said": set(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled sampler."""
        self.__dict__.update(state, _lock=threading.RLock())

    def reseed_rng(self) -> None:
        """Takes a fresh seed from the system, as Optuna's own samplers do."""
        self._seed = _fresh_seed()
        if self._independent_sampler is not None:
            self._independent_sampler.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Stores space (or declared ranks) and prior with the study, for ``recommend`` and other workers."""
        # read from the storage: under Hyperband, Optuna hides a study's attributes
        stored = study._storage.get_study_user_attrs(study._study_id)
        self._store_space(study, stored)
        try:
            with self._lock:
                self._settle_prior(study, identity_of(stored))
        except ValueError:  # Optuna would leave the trial RUNNING
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            raise
        if self._independent_sampler is not None:
            self._independent_sampler.before_trial(study, trial)

    def _store_space(self, study: Study, stored: Mapping[str, Any]) -> None:
        """Stores the space, or the declared ranks, at the first trial in a study; says when the study has others."""
        own: dict[str, Any] | list[str]
        if self.space is not None:
            key, own = SPACE_ATTR, self.space.to_dict()
        elif self.ranks is not None:
            key, own = RANKS_ATTR, list(self.ranks)
        else:
            return
        if stored.get(key) == own:
            self._is_new((key, study._study_id))
            return
        if stored.get(key) is not None and self._is_new((key, "other", study._study_id)):
            _logger.warning(
                f"Study {study.study_name!r} was searched with another rank space: {stored[key]!r:.200}. This worker "
                "goes on with its own, and recommend() takes the space of the worker that joined last."
            )
        if self._is_new((key, study._study_id)):  # workers with different spaces do not overwrite each other in turn
            study._storage.set_study_user_attr(study._study_id, key, own)

    def _is_new(self, message: Any) -> bool:  # noqa: ANN401
        """Returns whether this is the first time that a message is due."""
        with self._lock:
            known = message in self._said
            self._said.add(message)
        return not known

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tells the independent sampler; the performance model is rebuilt from the storage."""
        if self._independent_sampler is not None:
            self._independent_sampler.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns the ranks, the parameters searched with them, in their latest ranges, and those left to TPE."""
        with self._lock:
            history = self._history(study)
            searched = history.search_space(self.space, self.ranks)
        if self._independent_sampler is not None or history.names <= searched.keys():
            return searched
        return remaining_space(study, trial, searched) | searched

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes a configuration: first the uniform one, then optima of Thompson draws, all within the budget."""
        with self._lock:
            prior, history = self._prior_of(study), self._history(study)
            searched = history.search_space(self.space, self.ranks)
        search_space = {name: each for name, each in search_space.items() if name in searched or not each.single()}
        if all(each.single() for each in search_space.values()):
            return {}
        remainder = {name: search_space.pop(name) for name in sorted(history.names & search_space.keys() - searched)}
        self._warn_of_remainder(study, remainder)
        params = sample_remainder(study, trial, remainder, self._rng(trial, "remainder")) if remainder else {}
        return params | self._sample_searched(study, trial, search_space, history, prior) if search_space else params

    def _sample_searched(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
        history: History,
        prior: Prior | None,
    ) -> dict[str, Any]:
        """Proposes ranks, and the parameters searched with them."""
        encoding = self._encoding(search_space, history)
        given = _given_ranks(study, trial, encoding, search_space)
        rng = self._rng(trial, "relative")
        with self._lock:
            self._say_ranks(encoding)
            trials = history.encoded(encoding, lambda encoding: self._new_model(encoding, prior))
            allocations = Allocations.of(encoding.grid, self._budget(encoding), given)
            table, params = self._draw(study, trials, allocations, rng)
            if encoding.rank_names:
                ranks = Announcer(study, trial, history, trials).choose(
                    lambda is_seen: allocations.ranks_of(allocations.best_unseen(table, is_seen, rng)),
                    try_uniform=encoding.has_space and not given,
                )
                params |= encoding.rank_params(ranks)
        return {name: value for name, value in params.items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401
        """Samples with the independent sampler; by default TPE, reproducibly by trial and parameter."""
        if self.space is not None:
            self._check_name(trial, param_name, param_distribution)
        self._warn_of_remainder(study, [param_name])
        sampler = self._independent_sampler
        if sampler is None:
            sampler = tpe(self._rng(trial, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _say_ranks(self, encoding: Encoding) -> None:
        """Says, once, which parameters are taken for ranks by their names."""
        names = encoding.rank_names
        if self.space is None and self.ranks is None and names and self._is_new(tuple(names)):
            _logger.info(
                f"{len(names)} parameters are taken for ranks along the depth, {names[0]!r} to {names[-1]!r}. "
                "RankAdaptorSampler(ranks=...) declares others."
            )

    def _check_name(self, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> None:
        """Refuses a rank parameter in the style of other names than the space's, whose budget would not hold.

        Raises:
            ValueError: The trial has none of the space's parameters, and this name carries a layer number.
        """
        names = self.space.names if self.space is not None else {}
        template = rank_template(name, distribution)
        if template is not None and name not in names and names.keys().isdisjoint(trial.params):
            raise ValueError(
                f"the objective asks for {name!r}, the rank space has {next(iter(names))!r}: use space.suggest(trial), "
                f"or name the space's parameters, RankSpace(..., name={template!r})."
            )

    def _warn_of_remainder(self, study: Study, names: Collection[str]) -> None:
        """Says, once, which parameters of the finished trials are not searched with the ranks."""
        if not self._warns_of_independent or self._said.issuperset(("remainder", name) for name in names):
            return
        with self._lock:
            history = self._history(study)
            searched = history.search_space(self.space, self.ranks)
        new = [name for name in names if name in history.names and self._is_new(("remainder", name))]
        why = "not all recent trials with ranks have them, or they decide whether a trial has ranks"
        if searched.keys() >= set(new):
            why = "their ranges changed: the proposals lie outside"
        elif not searched:
            why = "no trial has parameters named like ranks (layer_3_rank); ranks=... declares them"
            why = why_no_ranks(history.distributions, self.ranks) or why
        sampler = "TPESampler" if self._independent_sampler is None else type(self._independent_sampler).__name__
        if new:
            _logger.warning(f"Left to {sampler}: {', '.join(map(repr, sorted(new)))}, as {why}.")

    def _history(self, study: Study) -> History:
        """Returns the study's trials up to now."""
        if self._cached is None or not self._cached.is_of(study):
            self._cached = History(study)
        self._cached.refresh()
        return self._cached

    def _settle_prior(self, study: Study, stored: str | None) -> None:
        """Settles the prior of a study, given the identity stored with it."""
        key, prior = (id(study._storage), study._study_id), self.prior.settle(study, stored)
        if self._settled.get(key, prior) is not prior:
            self._cached = None  # encoded trials hold features of the other prior
        self._settled[key] = prior

    def _prior_of(self, study: Study) -> Prior | None:
        key = id(study._storage), study._study_id
        if key not in self._settled:  # a sampler that wraps this one may not call before_trial
            self._settle_prior(study, identity_of(study._storage.get_study_user_attrs(study._study_id)))
        return self._settled[key]

    def _encoding(self, search_space: Mapping[str, BaseDistribution], history: History) -> Encoding:
        ranks = {} if self.space is None else self.space.distributions()
        if ranks.keys().isdisjoint(search_space):
            return Encoding(search_space, sensitivity=history.sensitivity, declared=self.ranks)
        # with all ranks: PartialFixedSampler removes those it fixes from the search space, but they cost, too
        return Encoding({**ranks, **search_space}, self.space, history.sensitivity)

    def _new_model(self, encoding: Encoding, prior: Prior | None = None) -> BayesianModel:
        return BayesianModel(encoding.grid, prior=prior, n_ordinary=encoding.width)

    def _budget(self, encoding: Encoding) -> float:
        return math.inf if self.space is None or not encoding.has_space else self.space.searched_budget

    def _rng(self, trial: FrozenTrial, purpose: str) -> np.random.Generator:
        """Returns a generator that depends on seed, trial number and purpose only."""
        return np.random.default_rng([self._seed, trial.number, zlib.crc32(purpose.encode())])

    def _draw(
        self, study: Study, trials: EncodedTrials, allocations: Allocations, rng: np.random.Generator
    ) -> tuple[Array, dict[str, Any]]:
        """Draws a function from the performance model's posterior, and its best ordinary parameters.

        Of a few draws, takes the draw whose optimum the model knows least about: a study's answer is what its model
        recommends, not its best trial, so knowledge near the optimum counts.

        Constraints are functions of the same features. A draw is penalised until its optimum is expected to keep them,
        by a margin where the latest trials did not.

        Returns:
            Value of each candidate rank in each layer by that draw, (L, C), and the ordinary parameters.
        """
        encoding, model, observations = trials.encoding, trials.model, trials.observations()
        incumbent = None
        if len(observations.trials) < max(1, self._n_startup_trials):
            model.fit(observations.features[:0], np.zeros(0))
        else:
            scores = scalarised(observations.values, study.directions, rng)
            model.fit(observations.features, scores, observations.variance)
            best = int(np.where(observations.feasible, scores, scores.min()).argmax())
            incumbent = np.asarray(encoding.point(observations.trials[best].params))

        constraints = self._constraints(trials)  # after the fit, as the squared total is linearised at the best trial
        margin = trials.margin if constraints else 0.0
        draws = []
        for _ in range(_N_DRAWS):
            draw, candidates = model.sample(rng), _candidates(encoding, incumbent, rng)
            draws.append(within_constraints(draw, constraints, allocations, candidates, margin))
        ranks = np.asarray([allocations.ranks_of(choice) for _, choice, _ in draws])
        features = model.encode(ranks, np.asarray([point for _, _, point in draws]))
        _, uncertainty = model.predict_difference(features, model.encode(encoding.grid.reference))
        belief, _, point = draws[int(uncertainty.argmax())]
        return belief.table, encoding.ordinary_params(point)

    def _constraints(self, trials: EncodedTrials) -> list[Belief]:
        """Returns the learned constraints, but for the budget, which allocations keep by construction."""
        has_budget = self._budget(trials.encoding) < math.inf
        return trials.learned_constraints(_RISK, without=(BUDGET,) if has_budget else ())


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1)[0])


def _given_ranks(
    study: Study, trial: FrozenTrial, encoding: Encoding, search_space: Mapping[str, BaseDistribution]
) -> dict[int, float]:
    """Returns the ranks of a trial that are not to be chosen, by row of the grid: they cost, too.

    Such are ranks that the trial has already (its worker was killed, and it is run again), ranks that ``enqueue_trial``
    or ``PartialFixedSampler`` fixed, and, at their most expensive, ranks missing from the search space.
    """
    largest = {name: values[-1] for name, values in zip(encoding.rank_names, encoding.grid.values, strict=True)}
    given: dict[str, Any] = {name: rank for name, rank in largest.items() if name not in search_space}
    given |= getattr(study.sampler, _FIXED_PARAMS_OF_SAMPLER, {})
    given |= planned_params(trial)
    return {row: given[name] for row, name in enumerate(encoding.rank_names) if name in given}


def _candidates(encoding: Encoding, incumbent: Array | None, rng: np.random.Generator) -> Callable[[Belief], Points]:
    """Returns a function that returns points of the ordinary parameters to choose from, given a belief.

    They are random points and points near the incumbent, the same for every belief, and points near the best of them.
    """
    points = encoding.random_points(_N_RANDOM if encoding.width else 1, rng)
    if incumbent is not None and encoding.width:
        points = np.concatenate([points, encoding.points_near(incumbent, _N_NEAR, rng)])
    features = ordinary_features(points)

    def candidates(belief: Belief) -> Points:
        if not encoding.width:
            return Points(points, features)
        best: Array = points[belief.of_features(features).argmax()]
        near = encoding.points_near(best, _N_NEAR, rng)
        return Points(np.concatenate([points, near]), np.concatenate([features, ordinary_features(near)]))

    return candidates
