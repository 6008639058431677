"""Final values of pruned trials, predicted from their reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.attributes import ITEMS_ATTR
from rankadaptor_optuna.surrogate.grid import Array

_MIN_COMPARED = 3  # trials with a value; a line needs two, and its scatter a third; set by hand
_PRIOR_TRIALS = 2  # weight of the prior slope, in trials; set by hand
_PRIOR_SQUARES = 0.5  # squared residuals that are added, in variances of the values; set by hand


def extrapolated_values(trials: Sequence[FrozenTrial], values: Array) -> dict[int, tuple[float, float]]:
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

    Args:
        trials: Complete and pruned trials, n.
        values: Their values, (n,), NaN where unknown.

    Returns:
        Value and variance by index in ``trials``, for pruned trials with at least 3 trials to compare with.
    """
    by_steps: dict[tuple[int, ...], list[int]] = {}
    for i in map(int, np.flatnonzero(np.isnan(values))):
        reports = trials[i].intermediate_values
        if trials[i].state is TrialState.PRUNED and reports:
            steps = tuple(sorted(reports)) if trials[i].user_attrs.get(ITEMS_ATTR) else (max(reports),)
            if math.isfinite(_mean_report(trials[i], steps)):
                by_steps.setdefault(steps, []).append(i)
    extrapolated = {}
    for steps, pruned in by_steps.items():
        pairs = [
            (report, value)
            for trial, value in zip(trials, values, strict=True)
            if not math.isnan(value) and math.isfinite(report := _mean_report(trial, steps))
        ]
        if len(pairs) < _MIN_COMPARED:
            continue
        x, y = np.asarray(pairs, dtype=np.float64).T
        n, centred = len(x), x - x.mean()
        squares = float(centred @ centred) or 1.0
        prior_slope = y.std() / (x.std() or math.inf)
        slope = max(0.0, (n * float(centred @ y) / squares + _PRIOR_TRIALS * prior_slope) / (n + _PRIOR_TRIALS))
        residuals = y - y.mean() - slope * centred
        noise = (float(residuals @ residuals) + _PRIOR_SQUARES * y.var()) / n
        for i in pruned:
            distance = _mean_report(trials[i], steps) - x.mean()
            extrapolated[i] = (y.mean() + slope * distance, noise * (1 + 1 / n + distance**2 / squares))
    return extrapolated


def _mean_report(trial: FrozenTrial, steps: Sequence[int]) -> float:
    """Returns the mean of a trial's reports at ``steps``; NaN where a report is missing."""
    return sum(trial.intermediate_values.get(step, math.nan) for step in steps) / len(steps)
