"""Finished trials as observations of the performance model: encoded once each, pruned trials extrapolated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.extrapolation import extrapolated_values
from rankadaptor_optuna.sampling.trials import announced_ranks, constraints_of, has_finite_values
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.grid import Array

_N_LATEST = 10  # trials over which the share of infeasible ones is taken; set by hand
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

    @property
    def margin(self) -> float:
        """Margin by which proposals must keep a constraint, in units of its size: the latest trials' infeasible share.

        The more of the latest 10 trials were infeasible, the further the next proposal stays away from the boundary.
        """
        return float(np.mean(~self.feasible[-_N_LATEST:])) if len(self.feasible) else 0.0


class EncodedTrials:
    """Finished trials encoded for one search space.

    Args:
        encoding: The search space.
        model: The model that encodes the trials; callers fit it.
        n_objectives: Number of objectives, M.

    Attributes:
        tried: States of the finished trials of each rank configuration, ``{ranks: states}``.
    """

    def __init__(self, encoding: Encoding, model: BayesianModel, n_objectives: int = 1) -> None:
        self.encoding, self.model = encoding, model
        self.tried: dict[tuple[int, ...], list[TrialState]] = {}
        self._n_read = 0
        self._features = model.encode(np.zeros((0, model.grid.n_layers)), np.zeros((0, encoding.width)))
        self._values = np.zeros((0, n_objectives))
        self._trials: list[FrozenTrial] = []
        self._constraints: list[dict[str, float]] = []

    def add(self, finished: Sequence[FrozenTrial]) -> None:
        """Encodes the trials of a growing list that it has not encoded yet.

        Trials that failed or lack a parameter count as tried, and are no observations.
        """
        names = self.encoding.rank_names + self.encoding.ordinary_names
        usable = []
        for trial in finished[self._n_read :]:
            if (ranks := announced_ranks(trial, self.encoding.rank_names)) is not None:
                self.tried.setdefault(ranks, []).append(trial.state)
            if trial.state is not TrialState.FAIL and all(name in trial.params for name in names):
                usable.append(trial)
        self._n_read = len(finished)
        if not usable:
            return
        trials = self._trials + usable
        features = self.model.encode(
            np.asarray([self.encoding.ranks(t.params) for t in usable]),
            np.asarray([self.encoding.point(t.params) for t in usable]),
        )
        unknown = [math.nan] * self._values.shape[1]
        values = [t.values if has_finite_values(t) else unknown for t in usable]
        # by number: every process sums the same values in the same order, whichever trial finished first
        order = np.argsort([t.number for t in trials], kind="stable")
        constraints = self._constraints + [constraints_of(t) for t in usable]
        self._features = np.concatenate([self._features, features])[order]
        self._values = np.concatenate([self._values, values])[order]
        self._trials = [trials[i] for i in order]
        self._constraints = [constraints[i] for i in order]

    def observations(self) -> Observations:
        """Returns the trials with a value; with one objective, pruned trials get an extrapolated value."""
        values, variance = self._values.copy(), np.zeros(len(self._values))
        if self._values.shape[1] == 1:
            for i, (value, uncertainty) in extrapolated_values(self._trials, values[:, 0]).items():
                values[i], variance[i] = value, uncertainty
        known = np.flatnonzero(~np.isnan(values[:, 0]))
        feasible = [all(c <= 0 for c in self._constraints[i].values()) for i in known]
        return Observations(
            features=self._features[known],
            values=values[known],
            variance=variance[known],
            trials=[self._trials[i] for i in known],
            feasible=np.asarray(feasible, dtype=bool),
        )

    def constraints(self) -> dict[str, tuple[Array, Array]]:
        """Returns features (n, F) and values (n,) of each constraint that was not always 0, by name.

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
