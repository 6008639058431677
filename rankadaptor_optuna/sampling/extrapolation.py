"""Final values of pruned trials, predicted from their reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.database.attributes import ITEMS_ATTR
from rankadaptor_optuna.surrogate.grid import Array

_MIN_COMPARED = 3  # trials with a value; a line needs two, and its scatter a third; set by hand
_PRIOR_TRIALS = 2  # weight of the prior slope, in trials; set by hand
_PRIOR_SQUARES = 0.5  # squared residuals that are added, in variances of the values; set by hand


class Extrapolation:
    """Predicts the final value of each pruned trial by linear regression on the reports of trials with a value.

    With reports x and values y of the n trials that reported at the same step, the prediction at x* and its variance
    are (Weisberg, Applied Linear Regression, 2005, section 2.8.3)::

        mean(y) + b (x* - mean(x))
        s2 (1 + 1/n + (x* - mean(x))^2 / Sxx)        Sxx = sum (x - mean(x))^2

    where least squares is regularised, as n is small:

    * b = max(0, (n Sxy / Sxx + 2 sd(y) / sd(x)) / (n + 2)). Reports measure the optimised score, so both rise; the
      prior slope, as steep as their spreads allow, weighs two trials. A pruned trial's report lies beyond the others',
      where a falling slope fitted to noise would make it the best.
    * s2 = (sum of squared residuals + var(y) / 2) / n, so that a few points on a line do not look certain.

    A report is the one at the pruned trial's last step. Where steps are items of an evaluation (``ITEMS_ATTR``), it is
    the mean over all items that the pruned trial reported, as these may be easier than the other items.
    """

    def __init__(self) -> None:
        self._trials: list[FrozenTrial] = []
        self._rows: dict[tuple[int, ...], int] = {}  # of the table, by the steps of a report
        self._pruned: dict[int, int] = {}  # row of each pruned trial's report, by trial number
        self._table = np.zeros((0, 0))  # reports by row and trial number, NaN where a trial has none

    def add(self, trials: Iterable[FrozenTrial]) -> None:
        """Adds finished trials of a study, each once."""
        new = list(trials)
        steps = {trial.number: _steps_of_report(trial) for trial in new if trial.state is TrialState.PRUNED}
        unknown = [each for each in dict.fromkeys(steps.values()) if each and each not in self._rows]
        self._rows |= {each: len(self._rows) + i for i, each in enumerate(unknown)}
        width = max([self._table.shape[1], *(trial.number + 1 for trial in new)])
        table = np.full((len(self._rows), width), math.nan)
        table[: self._table.shape[0], : self._table.shape[1]] = self._table
        for trials, rows in ((self._trials, unknown), (new, self._rows)):
            if rows:
                _fill(table, trials, {each: self._rows[each] for each in rows})
        self._table = table
        self._trials += new
        self._pruned |= {number: self._rows[each] for number, each in steps.items() if each}

    def of(self, numbers: Sequence[int], values: Array) -> dict[int, tuple[float, float]]:
        """Returns value and variance of pruned trials with at least 3 trials to compare with.

        Args:
            numbers: Numbers of n added trials.
            values: Their values, (n,), NaN where unknown.

        Returns:
            Predictions by index in ``numbers``.
        """
        if not self._rows:
            return {}
        has_value = ~np.isnan(values)
        x, y = self._table[:, np.asarray(numbers, dtype=np.intp)[has_value]], values[has_value]
        compared = np.isfinite(x)
        n = np.maximum(compared.sum(1), 1)
        mean_x, mean_y = np.where(compared, x, 0).sum(1) / n, np.where(compared, y, 0).sum(1) / n
        dx, dy = np.where(compared, x - mean_x[:, None], 0), np.where(compared, y - mean_y[:, None], 0)
        squares, variance = (dx**2).sum(1), (dy**2).sum(1) / n
        differ = squares > 0
        squares = np.where(differ, squares, 1)
        prior_slope = np.where(differ, np.sqrt(variance / (squares / n)), 0)
        slope = np.maximum(0, (n * (dx * dy).sum(1) / squares + _PRIOR_TRIALS * prior_slope) / (n + _PRIOR_TRIALS))
        noise = (((dy - slope[:, None] * dx) ** 2).sum(1) + _PRIOR_SQUARES * variance) / n
        extrapolated = {}
        for i in np.flatnonzero(~has_value).tolist():
            row = self._pruned.get(numbers[i])
            if row is None or compared[row].sum() < _MIN_COMPARED or not math.isfinite(self._table[row, numbers[i]]):
                continue
            distance = self._table[row, numbers[i]] - mean_x[row]
            spread = noise[row] * (1 + 1 / n[row] + distance**2 / squares[row])
            extrapolated[i] = float(mean_y[row] + slope[row] * distance), float(spread)
        return extrapolated


def _fill(table: Array, trials: Iterable[FrozenTrial], rows: Mapping[tuple[int, ...], int]) -> None:
    """Enters the reports of trials into some rows of the table."""
    single = {steps[0]: row for steps, row in rows.items() if len(steps) == 1}
    several = {steps: row for steps, row in rows.items() if len(steps) > 1}
    for trial in trials:
        known = single.keys() & trial.intermediate_values.keys()
        table[[single[step] for step in known], trial.number] = [trial.intermediate_values[step] for step in known]
        for steps, row in several.items():
            table[row, trial.number] = _mean_report(trial, steps)


def _steps_of_report(trial: FrozenTrial) -> tuple[int, ...]:
    """Returns the steps whose mean is a pruned trial's report; none where it reported nothing."""
    reports = trial.intermediate_values
    if not reports:
        return ()
    return tuple(sorted(reports)) if trial.user_attrs.get(ITEMS_ATTR) else (max(reports),)


def _mean_report(trial: FrozenTrial, steps: Sequence[int]) -> float:
    """Returns the mean of a trial's reports at ``steps``; NaN where a report is missing."""
    reports = trial.intermediate_values
    return sum(reports.get(step, math.nan) for step in steps) / len(steps)
