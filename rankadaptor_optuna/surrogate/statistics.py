"""Statistics of scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rankadaptor_optuna.surrogate.grid import Array


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's, ties sharing their mean rank; 0 where either is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        middle: Array = np.cumsum(counts) - (counts - 1) / 2
        ranks.append(middle[inverse])
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def t_interval(values: ArrayLike, coverage: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of two or more values."""
    x = np.asarray(values, dtype=np.float64)
    half = _t_quantile((1 + coverage) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def _t_quantile(p: float, df: int) -> float:
    """Quantile, p > 0.5, by quadrature: with t = sqrt(df) tan(angle) the density becomes cos(angle)^(df - 1)."""
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (df - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(df) * np.tan(np.interp(2 * p - 1, mass / mass[-1], angles)))


class Standardised(NamedTuple):
    """Scores standardised within a study.

    Attributes:
        targets: (n,), of mean 0 and spread 1 but for what is far out.
        location: Their mean in score units.
        spread: Their standard deviation in score units.
        doubt: Variance that those far out have beyond the common noise, (n,), standardised.
    """

    targets: Array
    location: float
    spread: float
    doubt: Array


def standardise(scores: Array) -> Standardised:
    """Scores standardised within the study.

    Scores further than twenty robust deviations from the median (a recovery that diverged) are pulled in, set no scale,
    and count little: they say that something is bad, not how bad. The limit is so wide because in a search that
    converges most scores are alike, and the few that differ are what its model rests on.
    """
    if not len(scores):
        return Standardised(scores, 0.0, 1.0, scores)
    median = np.median(scores)
    limit = 20 * 1.4826 * float(np.median(np.abs(scores - median)))
    near = (np.abs(scores - median) <= limit) | (limit == 0)
    location, spread = float(scores[near].mean()), float(scores[near].std()) or 1.0
    pulled = np.where(near, scores, median + np.sign(scores - median) * limit)
    return Standardised((pulled - location) / spread, location, spread, np.where(near, 0, (limit / 2 / spread) ** 2))
