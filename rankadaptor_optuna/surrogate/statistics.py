"""Statistics of scores: standardisation, rank correlation, and the interval of a mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankadaptor_optuna.surrogate.grid import Array

# Distance from the median, in robust standard deviations, beyond which a score counts as diverged. It is that wide
# because most scores of a search that converges are alike, and the few that differ carry most of what is known about
# the slopes: on a development task, with a limit of 5 (and full weight beyond it), the rank correlation of predictions
# was 0.88 instead of 0.94, and the 95% intervals held 75% instead of 94%.
_DIVERGED = 20
# One bad outcome: at least so many scores that are so much more alike than the better scores, and so far apart from
# them by Ashman's D; set by hand. Scores of a search that converges are alike near the best, not far from it.
_FEWEST, _MIN_GOOD_SHARE, _ALIKE, _SEPARATION = 3, 0.2, 0.1, 10
_ROUNDING = 1e-12  # variance of equal values, computed from sums of squares, in squares of their mean
_EQUAL = 1e-9  # difference of scores that is rounding; set by hand
_MAD_TO_STD = 1.4826  # standard deviations per median absolute deviation: 1 / normal quantile of 0.75


def diverged(scores: Array) -> NDArray[np.bool_]:
    """Returns which scores (n,), higher is better, are so bad that their recovery has diverged.

    These are the scores further than 20 robust standard deviations below the median and, as the median itself may have
    diverged, those of one bad outcome (a loss of 100 for each failure): at least three scores, and at most four fifths
    of all, whose spread is at most a tenth of that of the better ones, clearly apart from them: D = sqrt(2) |m1 - m2| /
    sqrt(s1^2 + s2^2) >= 10 with the means and standard deviations of both (Ashman, Bird & Zepf, 1994, Astronomical
    Journal 108, equation 4).
    """
    n = len(scores)
    if n < 2:
        return np.zeros(n, dtype=bool)
    bad = np.median(scores) - scores > _limit(scores)
    order = np.argsort(-scores, kind="stable")
    from_best = scores.max() - scores[order]
    n_good = np.arange(1, n)
    is_split = _are_apart(from_best) & (n_good >= max(_FEWEST, _MIN_GOOD_SHARE * n)) & (n - n_good >= _FEWEST)
    if is_split.any():
        bad[order[n_good[is_split][0] :]] = True
    return bad


def _are_apart(values: Array) -> NDArray[np.bool_]:
    """Returns whether the rest of n increasing values is one bad outcome, after each of the first n - 1, (n - 1,)."""
    scaled = values / (values[-1] or 1.0)  # squares must not overflow
    low, low_variance = _running_moments(scaled[:-1])
    below, high_variance = _running_moments(scaled[-1] - scaled[:0:-1])  # from the worst, so that no digits cancel
    high, high_variance = scaled[-1] - below[::-1], high_variance[::-1]
    is_alike = (low_variance > _ROUNDING * low**2) & (high_variance <= _ALIKE**2 * low_variance)
    apart: NDArray[np.bool_] = is_alike & ((high - low) ** 2 * 2 >= _SEPARATION**2 * (low_variance + high_variance))
    return apart & (high > low)


def _running_moments(values: Array) -> tuple[Array, Array]:
    """Returns mean and variance of the first 1, 2, ... values, (n,) each."""
    n = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / n
    return mean, np.maximum(np.cumsum(values**2) / n - mean**2, 0)


def _limit(scores: Array) -> float:
    """Returns the distance from the median beyond which a score is an outlier; infinite where all are equal."""
    distances = np.abs(scores - np.median(scores))
    distances = distances if np.median(distances) > 0 else distances[distances > 0]
    return _DIVERGED * _MAD_TO_STD * float(np.median(distances)) if len(distances) else np.inf


class Standardised(NamedTuple):
    """Scores standardised within a study: targets = (scores - location) / spread, but for diverged scores.

    Attributes:
        targets: The standardised scores, (n,).
        location: Mean of the scores that have not diverged.
        spread: Standard deviation of the scores that have not diverged; 1 where it is 0.
        doubt: Variance of each target beyond the common noise, (n,): 0 but for diverged scores.
    """

    targets: Array
    location: float
    spread: float
    doubt: Array


def standardise(scores: Array) -> Standardised:
    """Returns the scores (n,) standardised within the study.

    A score that has diverged, or is as far above the median of the others, is pulled in to 20 robust standard
    deviations from that median, does not count for location and spread, and has a standard deviation of half that
    distance times the root of the number of such scores: together they say that something is bad, not how bad.
    """
    if not len(scores):
        return Standardised(scores, 0.0, 1.0, scores)
    others = scores[~diverged(scores)]
    median, limit = np.median(others), _limit(others)
    near = ~diverged(scores) & (scores - median <= limit)
    location, spread = float(scores[near].mean()), float(scores[near].std()) or 1.0
    distance = limit if np.isfinite(limit) else spread
    pulled = np.where(near, scores, median + np.sign(scores - median) * distance)
    doubt = np.where(near, 0, (~near).sum() * (distance / 2 / spread) ** 2)
    return Standardised((pulled - location) / spread, location, spread, doubt)


def rank_correlation(a: Array, b: Array) -> float:
    """Returns Spearman's rank correlation, ties sharing their mean rank; 0 where either array is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        middle: Array = np.cumsum(counts) - (counts - 1) / 2
        ranks.append(middle[inverse])
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def alike(values: ArrayLike) -> bool:
    """Returns whether all values are equal but for rounding, as differences of coarse scores may be.

    They have no spread to compute an interval from.
    """
    return bool(np.ptp(np.asarray(values)) < _EQUAL)


def t_interval(values: ArrayLike, coverage: float = 0.95) -> tuple[float, float]:
    """Returns Student's t interval of the mean of two or more values."""
    x = np.asarray(values, dtype=np.float64)
    half = _t_quantile((1 + coverage) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def _t_quantile(p: float, df: int) -> float:
    """Returns the quantile of Student's t distribution, p > 0.5, by the trapezoidal rule (SciPy is no dependency).

    With t = sqrt(df) tan(angle) the density is proportional to cos(angle)^(df - 1).
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (df - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(df) * np.tan(np.interp(2 * p - 1, mass / mass[-1], angles)))
