"""A study's trials as the performance model sees them: each read from the storage once, and encoded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from rankadaptor_optuna.attributes import ITEMS_ATTR, PROPOSAL_ATTR, SENSITIVITY_ATTR, VERIFY_ATTR
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.grid import Array

_MIN_TO_EXTRAPOLATE = 3
_LATEST = 10


class History:
    """The search's trials, without those that verify; a cache that any process can rebuild from the storage.

    What verifies has another seed: its score has another offset, and its ranks may be tried on the study's own seed.

    Attributes:
        finished: Finished trials in the order in which they were read.
        unfinished: Waiting and running trials as of the last ``refresh``.
        common: Parameters that every completed trial has, with their latest distribution (a range may have changed).
        sensitivity: What the study knows of its layers, by rank parameter: see ``Encoding``.
    """

    def __init__(self, study: Study) -> None:
        self._storage, self._study_id = study._storage, study._study_id
        self._encoded: EncodedTrials | None = None
        self._reset()

    def _reset(self) -> None:
        self.finished: list[FrozenTrial] = []
        self.unfinished: list[FrozenTrial] = []
        self.common: dict[str, BaseDistribution] = {}
        self.sensitivity: dict[str, float] = {}
        self._latest, self._n_seen = -1, 0
        self._encoded = None
        self._n_values = len(self._storage.get_study_directions(self._study_id))

    def is_of(self, study: Study) -> bool:
        """Whether this is the history of ``study``."""
        return study._storage is self._storage and study._study_id == self._study_id

    def refresh(self) -> None:
        """Reads what has finished since the last call.

        It asks the storage, not the study: where Optuna's Hyperband runs, a study shows one bracket's trials only.
        """
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        if len(trials) < self._n_seen or (self.finished and not _is_in(self.finished[-1], trials)):
            self._reset()  # the study was deleted, and another one got its id
        if not self.sensitivity:
            self.sensitivity = self._storage.get_study_user_attrs(self._study_id).get(SENSITIVITY_ATTR, {})
        unread = [trials[t.number] for t in self.unfinished] + trials[self._n_seen :]
        unread = [t for t in unread if verification_seed(t) is None]
        self._n_seen = len(trials)
        self.unfinished = [t for t in unread if not t.state.is_finished()]
        for trial in unread:
            if trial.state.is_finished():
                self.finished.append(trial)
            if trial.state is TrialState.COMPLETE:
                self._narrow(trial)

    def _narrow(self, trial: FrozenTrial) -> None:
        known = self.common if self._latest >= 0 else trial.distributions
        newer = trial.distributions if trial.number > self._latest else known
        self.common = {name: newer[name] for name in known if name in trial.distributions}
        self._latest = max(self._latest, trial.number)

    @property
    def searched(self) -> dict[str, BaseDistribution]:
        """The common parameters that have more than one value, by name: storages differ in their order."""
        return {name: dist for name, dist in sorted(self.common.items()) if not dist.single()}

    def encoded(self, encoding: Encoding, new_model: Callable[[Encoding], BayesianModel]) -> EncodedTrials:
        """The finished trials as input of a performance model, made where nothing was encoded so before."""
        if self._encoded is None or not self._encoded.encoding.is_like(encoding):
            self._encoded = EncodedTrials(encoding, new_model(encoding), self._n_values)
        self._encoded.take(self.finished)
        return self._encoded


class Data(NamedTuple):
    """What the performance model learns from, by trial number.

    Attributes:
        rows: Features, (n, F).
        values: Objective values, (n, M).
        variance: How uncertain each value is by itself, (n,): not 0 where it was extrapolated from reports.
        trials: The trials, n.
        feasible: Whether each keeps all the constraints that it was given, (n,).
    """

    rows: Array
    values: Array
    variance: Array
    trials: list[FrozenTrial]
    feasible: NDArray[np.bool_]

    @property
    def margin(self) -> float:
        """By how much (in units of its size) to keep a constraint: the share of the latest trials that broke one."""
        return float(np.mean(~self.feasible[-_LATEST:])) if len(self.feasible) else 0.0


class EncodedTrials:
    """Finished trials encoded for one search space.

    Args:
        encoding: Its parameters.
        model: Encodes them, and is there for the caller to fit.
        n_values: Number of objectives.

    Attributes:
        tried: How the trials of each rank configuration ended, ``{ranks: states}``.
    """

    def __init__(self, encoding: Encoding, model: BayesianModel, n_values: int = 1) -> None:
        self.encoding, self.model = encoding, model
        self.tried: dict[tuple[int, ...], list[TrialState]] = {}
        self._n_taken = 0
        self._rows = model.encode(np.zeros((0, model.grid.n_layers)), np.zeros((0, encoding.width)))
        self._values = np.zeros((0, n_values))
        self._trials: list[FrozenTrial] = []
        self._constraints: list[dict[str, float]] = []

    def take(self, finished: list[FrozenTrial]) -> None:
        """Encodes the trials beyond those already taken."""
        names = self.encoding.rank_names + self.encoding.ordinary_names
        usable = []
        for trial in finished[self._n_taken :]:
            if (ranks := announced(trial, self.encoding.rank_names)) is not None:
                self.tried.setdefault(ranks, []).append(trial.state)
            if trial.state is not TrialState.FAIL and all(name in trial.params for name in names):
                usable.append(trial)
        self._n_taken = len(finished)
        if not usable:
            return
        trials = self._trials + usable
        rows = self.model.encode(
            np.asarray([self.encoding.ranks(t.params) for t in usable]),
            np.asarray([self.encoding.point(t.params) for t in usable]),
        )
        unknown = [math.nan] * self._values.shape[1]
        values = [t.values if _has_values(t) else unknown for t in usable]
        # by number, so that every process adds up the same numbers in the same order, whoever finished first
        order = np.argsort([t.number for t in trials], kind="stable")
        constraints = self._constraints + [constraints_of(t) for t in usable]
        self._rows = np.concatenate([self._rows, rows])[order]
        self._values = np.concatenate([self._values, values])[order]
        self._trials = [trials[i] for i in order]
        self._constraints = [constraints[i] for i in order]

    def data(self) -> Data:
        """The trials with a value; pruned ones with the final value that their reports predict."""
        values, variance = self._values.copy(), np.zeros(len(self._values))
        if self._values.shape[1] == 1:
            for i, (value, uncertainty) in _extrapolated(self._trials, values[:, 0]).items():
                values[i], variance[i] = value, uncertainty
        keep = np.flatnonzero(~np.isnan(values[:, 0]))
        feasible = [all(c <= 0 for c in self._constraints[i].values()) for i in keep]
        return Data(
            self._rows[keep], values[keep], variance[keep], [self._trials[i] for i in keep], np.asarray(feasible, bool)
        )

    def constraints(self) -> dict[str, tuple[Array, Array]]:
        """Features (n, F) and values (n,) of each constraint, pruned trials and those without a value included."""
        found = {}
        ended = np.asarray([t.state is TrialState.COMPLETE for t in self._trials])  # pruned ones may have none yet
        for name in sorted(set().union(*self._constraints)):
            given = np.asarray([given.get(name, math.nan) for given in self._constraints])
            values = _spelled_out(given)
            known = np.flatnonzero(~np.isnan(values) & (ended | ~np.isnan(given)))
            if values[known].any():
                found[name] = self._rows[known], values[known]
        return found


def announced(trial: FrozenTrial, names: list[str]) -> tuple[int, ...] | None:
    """The rank configuration that a trial has, or said it would have before its parameters were stored."""
    ranks: list[Any] = [trial.params.get(name) for name in names]
    if None in ranks:
        ranks = trial.system_attrs.get(PROPOSAL_ATTR, [])
    return tuple(ranks) if names and len(ranks) == len(names) else None


def verification_seed(trial: BaseTrial) -> int | None:
    """The seed on which a trial verifies a configuration; None for an ordinary trial, which takes the study's own.

    ``RecoveryObjective`` heeds it. An objective of your own does, too, where it draws all that is random by it::

        seed = verification_seed(trial)
        return train_and_score(ranks, seed=0 if seed is None else seed)
    """
    seed = trial.user_attrs.get(VERIFY_ATTR)
    return None if seed is None else int(seed)


def _is_in(known: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    now = trials[known.number] if known.number < len(trials) else None
    return now is not None and (now._trial_id, now.datetime_start) == (known._trial_id, known.datetime_start)


def _has_values(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and all(map(math.isfinite, trial.values))


def constraints_of(trial: FrozenTrial) -> dict[str, float]:
    """The constraints that a trial was given, kept where at most 0."""
    if hasattr(trial, "constraints"):
        return dict(trial.constraints)
    return {str(i): c for i, c in enumerate(trial.system_attrs.get("constraints") or ())}  # Optuna 4


def _spelled_out(values: Array) -> Array:
    """Constraint values, NaN for none, that say of kept constraints too by how much, as far as they leave it open.

    Where none is below 0 (only violations were given, or 0 for none), the trials that keep the constraint get the
    opposite of the others' mean. Values far from the rest, infinite ones too, are pulled in, as they set the scale.
    """
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    limit = min(size.max(), 5 * np.median(size)) if len(size) else 1.0
    values = np.clip(values, -limit, limit)
    over = values > 0
    if over.any() and not (values < 0).any():
        values[~over] = -values[over].mean()
    return values


def _extrapolated(trials: list[FrozenTrial], values: Array) -> dict[int, tuple[float, float]]:
    """Final value of each pruned trial and its variance, by index, where enough trials show how to extrapolate.

    Linear regression of the final value on the report at the same step, over the trials with a value, never falling: a
    pruned trial's report lies beyond the others', where a slope fitted to noise would make it the best. The variance is
    that of a prediction by it, where two further observations, as wide as half the values' spread, keep a few points
    on a line from looking certain. Where the steps are items of an evaluation (``ITEMS_ATTR``), it is on the mean over
    the same items, as they may be easier than the others.
    """
    found = {}
    compared: dict[tuple[int, ...], list[int]] = {}
    for i in map(int, np.flatnonzero(np.isnan(values))):
        reports = trials[i].intermediate_values
        if trials[i].state is TrialState.PRUNED and reports:
            steps = tuple(sorted(reports)) if trials[i].user_attrs.get(ITEMS_ATTR) else (max(reports),)
            if math.isfinite(_mean_report(trials[i], steps)):
                compared.setdefault(steps, []).append(i)
    for steps, pruned in compared.items():
        pairs = [
            (x, y)
            for t, y in zip(trials, values, strict=True)
            if not math.isnan(y) and math.isfinite(x := _mean_report(t, steps))
        ]
        if len(pairs) < _MIN_TO_EXTRAPOLATE:
            continue
        x, y = np.asarray(pairs, dtype=np.float64).T
        centred = x - x.mean()
        squares = float(centred @ centred) or 1.0
        # reports are of what is optimised, so both rise: two further trials say so, as steeply as both spread
        steepest = y.std() / (x.std() or math.inf)
        slope = max(0.0, (len(x) * float(centred @ y) / squares + 2 * steepest) / (len(x) + 2))
        left = y - y.mean() - slope * centred
        noise = (float(left @ left) + 0.5 * y.var()) / len(x)
        for i in pruned:
            off = _mean_report(trials[i], steps) - x.mean()
            found[i] = (y.mean() + slope * off, noise * (1 + 1 / len(x) + off**2 / squares))
    return found


def _mean_report(trial: FrozenTrial, steps: Sequence[int]) -> float:
    """Mean of a trial's reports at some steps; NaN where one is missing."""
    return sum(trial.intermediate_values.get(step, math.nan) for step in steps) / len(steps)
