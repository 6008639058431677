"""Several objectives as one score: ParEGO's augmented Chebyshev function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.study import StudyDirection

from rankadaptor_optuna.surrogate.grid import Array

_RHO = 0.05  # weight of the sum beside the Chebyshev term: Knowles (2006), equation 2


def scalarised(values: Array, directions: Sequence[StudyDirection], rng: np.random.Generator) -> Array:
    """Returns objective values as scores, higher is better.

    One objective is returned with its sign. Several objectives are measured from the ideal point, in units of their
    ranges: z is 0 at the best value and -1 at the worst. They are joined by an augmented Chebyshev function with
    weights w drawn uniformly from the simplex anew for each proposal::

        min_j(w_j z_j) + 0.05 sum_j(w_j z_j)

    Different weights lead to different points of the Pareto front, in its concave regions too, which no weighted sum
    reaches (ParEGO: Knowles, IEEE Transactions on Evolutionary Computation 10(1), 2006, equation 2, for objectives
    that are minimised).

    Args:
        values: Objective values, (n, M).
        directions: Directions of the M objectives.
        rng: Source of the weights.

    Returns:
        Scores, (n,).
    """
    signs = np.asarray([1.0 if d is StudyDirection.MAXIMIZE else -1.0 for d in directions])
    scores: Array = values * signs
    if scores.shape[1] == 1:
        return scores[:, 0]
    ranges = np.ptp(scores, axis=0)
    scores = (scores - scores.max(0)) / np.where(ranges > 0, ranges, 1)
    weighted = rng.dirichlet(np.ones(scores.shape[1])) * scores
    joined: Array = weighted.min(1) + _RHO * weighted.sum(1)
    return joined
