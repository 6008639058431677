"""A study's trials as the performance model sees them: each read from the storage once, and encoded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.surrogate.encoding import Encoding
from rankadaptor_optuna.surrogate.features import Array
from rankadaptor_optuna.surrogate.model import PerformanceModel

PROPOSAL_ATTR = "rankadaptor:proposal"
_MIN_TO_EXTRAPOLATE = 3


class History:
    """A study's trials; a cache that any process can rebuild from the storage.

    Attributes:
        finished: Finished trials in the order in which they were read.
        unfinished: Waiting and running trials as of the last ``refresh``.
        common: Parameters that every completed trial has, with their latest distribution (a range may have changed).
    """

    def __init__(self, study: Study) -> None:
        self._storage, self._study_id = study._storage, study._study_id
        self._encoded: EncodedTrials | None = None
        self._reset()

    def _reset(self) -> None:
        self.finished: list[FrozenTrial] = []
        self.unfinished: list[FrozenTrial] = []
        self.common: dict[str, BaseDistribution] = {}
        self._latest, self._n_seen = -1, 0
        self._encoded = None

    def is_of(self, study: Study) -> bool:
        """Whether this is the history of ``study``."""
        return study._storage is self._storage and study._study_id == self._study_id

    def refresh(self) -> None:
        """Reads what has finished since the last call.

        It asks the storage, not the study: where Optuna's Hyperband runs, a study shows one bracket's trials only.
        """
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        if self.finished and not _is_in(self.finished[-1], trials):
            self._reset()  # the study was deleted, and another one got its id
        unread = [trials[t.number] for t in self.unfinished] + trials[self._n_seen :]
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
        """The common parameters that have more than one value."""
        return {name: dist for name, dist in self.common.items() if not dist.single()}

    def encoded(self, encoding: Encoding, new_model: Callable[[Encoding], PerformanceModel]) -> EncodedTrials:
        """The finished trials as input of a performance model, made where nothing was encoded so before."""
        if self._encoded is None or not self._encoded.encoding.is_like(encoding):
            self._encoded = EncodedTrials(encoding, new_model(encoding))
        self._encoded.take(self.finished)
        return self._encoded


class Data(NamedTuple):
    """What the performance model learns from, by trial number.

    Attributes:
        rows: Features, (n, F).
        values: Objective values, (n, M).
        variance: How uncertain each value is by itself, (n,): not 0 where it was extrapolated from reports.
        trials: The trials, n.
        constraints: The constraints that each was given, n.
    """

    rows: Array
    values: Array
    variance: Array
    trials: list[FrozenTrial]
    constraints: list[dict[str, float]]


class EncodedTrials:
    """Finished trials encoded for one search space.

    Args:
        encoding: Its parameters.
        model: Encodes them, and is there for the caller to fit.

    Attributes:
        tried: How the trials of each rank configuration ended, ``{ranks: states}``.
    """

    def __init__(self, encoding: Encoding, model: PerformanceModel) -> None:
        self.encoding, self.model = encoding, model
        self.tried: dict[tuple[int, ...], list[TrialState]] = {}
        self._n_taken = 0
        empty = model.encode(np.zeros((0, model.grid.n_layers)), np.zeros((0, encoding.width)))
        self._data = Data(empty, np.zeros((0, 1)), np.zeros(0), [], [])

    def take(self, finished: list[FrozenTrial]) -> None:
        """Encodes the trials beyond those already taken."""
        names = self.encoding.rank_names + self.encoding.ordinary_names
        usable = []
        for trial in finished[self._n_taken :]:
            if (ranks := announced(trial, self.encoding.rank_names)) is not None:
                self.tried.setdefault(ranks, []).append(trial.state)
            if _is_usable(trial) and all(name in trial.params for name in names):
                usable.append(trial)
        self._n_taken = len(finished)
        if not usable:
            return
        old = self._data
        trials = old.trials + usable
        rows = self.model.encode(
            np.asarray([self.encoding.ranks(t.params) for t in usable]),
            np.asarray([self.encoding.point(t.params) for t in usable]),
        )
        values = np.asarray([t.values if t.state is TrialState.COMPLETE else [math.nan] for t in usable])
        # by number, so that every process adds up the same numbers in the same order, whoever finished first
        order = np.argsort([t.number for t in trials], kind="stable")
        constraints = old.constraints + [_constraints(t) for t in usable]
        self._data = Data(
            np.concatenate([old.rows, rows])[order],
            (np.concatenate([old.values, values]) if len(old.values) else values)[order],
            np.zeros(len(trials)),
            [trials[i] for i in order],
            [constraints[i] for i in order],
        )

    def data(self) -> Data:
        """The usable trials; pruned ones with the final value that their last report predicts."""
        data = self._data
        pruned: NDArray[np.bool_] = np.isnan(data.values[:, 0])
        if not pruned.any():
            return data
        values, variance = data.values.copy(), data.variance.copy()
        for i, (value, uncertainty) in _extrapolated(data.trials, pruned).items():
            values[i], variance[i] = value, uncertainty
        keep = np.flatnonzero(~np.isnan(values[:, 0]))
        return Data(
            data.rows[keep],
            values[keep],
            variance[keep],
            [data.trials[i] for i in keep],
            [data.constraints[i] for i in keep],
        )


def announced(trial: FrozenTrial, names: list[str]) -> tuple[int, ...] | None:
    """The rank configuration that a trial has, or said it would have before its parameters were stored."""
    ranks: list[Any] = [trial.params.get(name) for name in names]
    if None in ranks:
        ranks = trial.system_attrs.get(PROPOSAL_ATTR, [])
    return tuple(ranks) if names and len(ranks) == len(names) else None


def _is_in(known: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    now = trials[known.number] if known.number < len(trials) else None
    return now is not None and (now._trial_id, now.datetime_start) == (known._trial_id, known.datetime_start)


def _is_usable(trial: FrozenTrial) -> bool:
    if trial.state is TrialState.PRUNED:
        reports = trial.intermediate_values
        return bool(reports) and math.isfinite(reports[max(reports)])
    return trial.state is TrialState.COMPLETE and all(map(math.isfinite, trial.values))


def _constraints(trial: FrozenTrial) -> dict[str, float]:
    if hasattr(trial, "constraints"):
        return dict(trial.constraints)
    return {str(i): c for i, c in enumerate(trial.system_attrs.get("constraints") or ())}  # Optuna 4


def _extrapolated(trials: list[FrozenTrial], pruned: NDArray[np.bool_]) -> dict[int, tuple[float, float]]:
    """Final value of each pruned trial and its variance, by index, where enough trials show how to extrapolate.

    Linear regression of the final value on the report at the same step, over the completed trials; the variance is
    that of a prediction by it, where two further observations, as wide as half the values' spread, keep a few points
    on a line from looking certain.
    """
    found = {}
    last = {int(i): max(trials[i].intermediate_values) for i in np.flatnonzero(pruned)}
    for step in sorted(set(last.values())):
        pairs = [
            (x, t.value)
            for t, out in zip(trials, pruned, strict=True)
            if not out and math.isfinite(x := t.intermediate_values.get(step, math.nan))
        ]
        if len(pairs) < _MIN_TO_EXTRAPOLATE:
            continue
        x, y = np.asarray(pairs, dtype=np.float64).T
        centred = x - x.mean()
        squares = float(centred @ centred) or 1.0
        slope = float(centred @ y) / squares
        left = y - y.mean() - slope * centred
        noise = (float(left @ left) + 0.5 * y.var()) / len(x)
        for i, its_step in last.items():
            if its_step == step:
                off = trials[i].intermediate_values[step] - x.mean()
                found[i] = (y.mean() + slope * off, noise * (1 + 1 / len(x) + off**2 / squares))
    return found
