from __future__ import annotations

import numpy as np
import pytest

from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.features import ordinary_features


def test_a_sum_of_beliefs_has_the_sum_of_their_values():
    rng = np.random.default_rng(0)
    points = rng.random((4, 2))
    width = ordinary_features(points).shape[1]
    a, b = (Belief(rng.random((3, 5)), rng.random(width), offset) for offset in (1.5, 4.0))
    both = a.plus(b, -2.0)
    assert both.table == pytest.approx(a.table - 2 * b.table)
    assert both.of_ordinary(points) == pytest.approx(a.of_ordinary(points) - 2 * b.of_ordinary(points))
    assert both.offset == 1.5 - 2 * 4.0
