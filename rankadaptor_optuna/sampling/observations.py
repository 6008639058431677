"""Finished trials as observations of the performance model: encoded once each, pruned trials extrapolated."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.extrapolation import Extrapolation
from rankadaptor_optuna.sampling.trials import announced_ranks, constraints_of, has_failed, has_finite_values
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.failures import FailureModel
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.statistics import diverged

_N_LATEST = 10  # trials over which the share of infeasible ones is taken; set by hand
_MOST_MODELLED = 250  # latest failed and latest good trials that the model of failures learns from; by hand, for speed
_TINY = 1e-3  # keeps the logit finite where all of the latest trials failed
_MAX_VIOLATION = 5  # highest constraint value, in medians of the values' sizes; set by hand


class Observations(NamedTuple):
    """The observations that the performance model learns from, by trial number.

    Attributes:
        features: Features, (n, F).
        values: Objective values, (n, M).
        variance: Variance of each value beyond the common noise, (n,): positive for extrapolated values, else 0.
        trials: The trials, n.
        feasible: Whether each trial keeps all the constraints that it was given, (n,).
    """

    features: Array
    values: Array
    variance: Array
    trials: list[FrozenTrial]
    feasible: NDArray[np.bool_]


class EncodedTrials:
    """Finished trials encoded for one search space.

    Args:
        encoding: The search space.
        model: The model that encodes the trials; callers fit it.
        signs: 1 for each objective that is maximised, -1 for each that is minimised, (M,).

    Attributes:
        tried: States of the finished trials of each rank configuration, ``{ranks: states}``.
    """

    def __init__(self, encoding: Encoding, model: BayesianModel, signs: Sequence[float] = (1.0,)) -> None:
        self.encoding, self.model = encoding, model
        self.tried: dict[tuple[int, ...], list[TrialState]] = {}
        self._signs = np.asarray(signs)
        self._n_read = 0
        self._features = model.encode_with_cost(np.zeros((0, model.grid.n_layers)), np.zeros((0, encoding.width)))
        self._values = np.zeros((0, len(signs)))
        self._has_failed = self._is_allowed = np.zeros(0, dtype=bool)
        self._numbers = np.zeros(0, dtype=np.intp)
        self._interrupted: frozenset[int] = frozenset()
        self._extrapolation = Extrapolation()
        self._trials: list[FrozenTrial] = []
        self._constraints: list[dict[str, float]] = []

    def add(self, finished: Sequence[FrozenTrial], interrupted: Collection[int] = ()) -> None:
        """Encodes the trials of a growing list that it has not encoded yet.

        Trials that lack a parameter count as tried, and are no observations.

        Args:
            finished: Finished trials.
            interrupted: Numbers of trials that did not fail by themselves, see ``History``.
        """
        self._interrupted = frozenset(interrupted)
        for stale in ("failed", "_broken", "failure_model"):
            self.__dict__.pop(stale, None)
        names = self.encoding.rank_names + self.encoding.ordinary_names
        usable = []
        for trial in finished[self._n_read :]:
            if (ranks := announced_ranks(trial, self.encoding.rank_names)) is not None:
                self.tried.setdefault(ranks, []).append(trial.state)
            if all(name in trial.params for name in names):
                usable.append(trial)
        self._n_read = len(finished)
        if not usable:
            return
        self._extrapolation.add(usable)
        trials = self._trials + usable
        features = self.model.encode_with_cost(
            np.asarray([self.encoding.ranks(t.params) for t in usable]),
            np.asarray([self.encoding.point(t.params) for t in usable]),
        )
        unknown = [math.nan] * self._values.shape[1]
        values = [t.values if has_finite_values(t) else unknown for t in usable]
        # by number: every process sums the same values in the same order, whichever trial finished first
        numbers = np.concatenate([self._numbers, [t.number for t in usable]]).astype(np.intp)
        order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[order]
        constraints = self._constraints + [constraints_of(t) for t in usable]
        self._features = np.concatenate([self._features, features])[order]
        self._values = np.concatenate([self._values, values])[order]
        self._has_failed = np.concatenate([self._has_failed, [has_failed(t) for t in usable]])[order]
        allowed = [self.encoding.allows(t.params) for t in usable]
        self._is_allowed = np.concatenate([self._is_allowed, np.asarray(allowed, dtype=bool)])[order]
        self._trials = [trials[i] for i in order]
        self._constraints = [constraints[i] for i in order]

    def observations(self) -> Observations:
        """Returns the trials that have a value; with one objective, pruned trials get an extrapolated value."""
        values, variance = self._values.copy(), np.zeros(len(self._values))
        if self._values.shape[1] == 1:
            extrapolated = self._extrapolation.of(self._numbers.tolist(), values[:, 0])
            for i, (value, uncertainty) in extrapolated.items():
                values[i], variance[i] = value, uncertainty
        known = np.flatnonzero(~np.isnan(values[:, 0]))
        feasible = [all(c <= 0 for c in self._constraints[i].values()) for i in known]
        return Observations(
            features=self._features[known, :-1],
            values=values[known],
            variance=variance[known],
            trials=[self._trials[i] for i in known],
            feasible=np.asarray(feasible, dtype=bool),
        )

    @cached_property
    def failed(self) -> NDArray[np.bool_]:
        """Whether each trial had a bad outcome: it failed, or its score is not finite or has diverged, (n,).

        Trials within the present ranges are judged among themselves: with better scores out of reach, theirs are not
        divergence.
        """
        failed = self._has_failed & ~np.isin(self._numbers, list(self._interrupted))
        if len(self._signs) == 1:
            scores = self._signs[0] * self._values[:, 0]
            known, allowed = ~np.isnan(scores), self._is_allowed
            has_diverged = np.zeros(len(scores), dtype=bool)
            has_diverged[known] = diverged(scores[known])
            if not allowed.all():
                has_diverged[known & allowed] = diverged(scores[known & allowed])
            failed |= has_diverged
        return failed

    @property
    def margin(self) -> float:
        """Margin by which proposals must keep constraints, in units of their sizes.

        It is the share of the latest 10 trials that were infeasible or failed: the more of them, the further the next
        proposal stays away from the boundary.
        """
        bad = (self.failed | self._broken)[-_N_LATEST:]
        return float(bad.mean()) if len(bad) else 0.0

    @cached_property
    def _broken(self) -> NDArray[np.bool_]:
        """Whether each trial broke a constraint, (n,)."""
        return np.asarray([any(value > 0 for value in given.values()) for given in self._constraints], dtype=bool)

    @cached_property
    def failure_model(self) -> FailureModel | None:
        """The model of failures, on features and cost; None where all failed trials broke a constraint."""
        failed = self.failed
        bad, good = np.flatnonzero(failed & ~self._broken), np.flatnonzero(~failed)
        if not len(bad):
            return None
        rows = np.sort(np.concatenate([bad[-_MOST_MODELLED:], good[-_MOST_MODELLED:]]))
        kept_bad, kept_good = (min(1.0, _MOST_MODELLED / max(1, len(each))) for each in (bad, good))
        return self.model.failures(self._features[rows], failed[rows], math.log(kept_good / kept_bad))

    def failure(self, highest: float) -> Belief | None:
        """Returns the learned constraint that keeps away from failures; None where no trial failed.

        It is kept where the probability of failing is at most ``highest``, and the less the more of the latest trials
        failed: highest (1 - margin). Configurations need not be safer than the median of the trials that did not fail,
        so failures that nothing predicts forbid nothing. Failures in trials that broke a constraint are left to that
        constraint.
        """
        if (model := self.failure_model) is None:
            return None
        probability = max(highest * (1 - self.margin), _TINY)
        limit = math.log(probability / (1 - probability))
        if not (failed := self.failed).all():
            limit = max(limit, float(np.median(model.logit(self._features[~failed]))))
        return self.model.belief_with_cost(model.weights, -limit - self.margin)  # configurations keep it by the margin

    def learned_constraints(self, highest: float, without: Sequence[str] = ()) -> list[Belief]:
        """Returns each constraint's posterior mean, and ``failure``; functions that a configuration keeps at most 0.

        Args:
            highest: Highest probability of failing, see ``failure``.
            without: Names of constraints that are kept by other means.
        """
        given = self.constraints()
        learned = [self.model.constraint(*given[name]) for name in given if name not in without]
        failure = self.failure(highest)
        return learned if failure is None else [*learned, failure]

    def constraints(self) -> dict[str, tuple[Array, Array]]:
        """Returns features, cost last, (n, F + 1), and values (n,) of each constraint that was not always 0, by name.

        Trials without an objective value count too. A complete trial that was not given a constraint keeps it; a
        pruned trial may have ended before its constraint was known, and is left out.
        """
        found = {}
        complete = np.asarray([t.state is TrialState.COMPLETE for t in self._trials])
        for name in sorted(set().union(*self._constraints)):
            given = np.asarray([constraints.get(name, math.nan) for constraints in self._constraints])
            values = constraint_values(given)
            known = np.flatnonzero(~np.isnan(values) & (complete | ~np.isnan(given)))
            if values[known].any():
                found[name] = self._features[known], values[known]
        return found


def constraint_values(given: Array) -> Array:
    """Prepares a constraint's values for regression.

    Where no value is below 0 (objectives that report violations only, or 0 for none), trials that keep the constraint
    get the negative mean of the violations: the boundary lies halfway. Values larger than 5 times the median size,
    infinite values too, are clipped to that, as the largest values set the scale.

    Args:
        given: Values, (n,), NaN where a trial was given none.

    Returns:
        Values, (n,), NaN where still unknown.
    """
    size = np.abs(given[np.isfinite(given) & (given != 0)])
    limit = min(size.max(), _MAX_VIOLATION * np.median(size)) if len(size) else 1.0
    values = np.clip(given, -limit, limit)
    violated = values > 0
    if violated.any() and not (values < 0).any():
        values[~violated] = -values[violated].mean()
    return values
