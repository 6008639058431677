from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rankadaptor_optuna.surrogate.statistics import rank_correlation, standardise, t_interval


def test_scores_far_from_the_rest_count_in_full_and_diverged_ones_little():
    alike = np.linspace(-1, 1, 20)
    far, diverged = np.append(alike, [12.0, 14.0]), np.append(alike, 1e6)
    assert standardise(far).targets == pytest.approx((far - far.mean()) / far.std())
    assert not standardise(far).doubt.any()
    assert standardise(diverged).doubt[-1] > 10
    assert not standardise(diverged).doubt[:-1].any()
    assert standardise(diverged).spread == pytest.approx(alike.std())
    assert standardise(diverged).targets.argmax() == 20


def test_a_loss_that_diverged_to_random_guessing_does_not_set_the_scale():
    alike = 2.1 + 0.05 * np.random.default_rng(0).standard_normal(20)
    found = standardise(np.append(alike, np.log(256)))  # the loss of guessing one byte of 256, 60 deviations off
    assert (found.location, found.spread) == pytest.approx((alike.mean(), alike.std()))
    assert found.targets[:-1] == pytest.approx((alike - alike.mean()) / alike.std())
    assert found.targets[-1] > 2 * found.targets[:-1].max()
    assert found.doubt[-1] == pytest.approx((found.targets[-1] / 2) ** 2, rel=0.2)


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("coverage", [0.95, 0.9, 1 - 0.05 / 4])
def test_the_t_interval_is_scipys(n, coverage):
    values = np.random.default_rng(n).standard_normal(n)
    expected = stats.t.interval(coverage, n - 1, values.mean(), values.std(ddof=1) / np.sqrt(n))
    assert t_interval(values, coverage) == pytest.approx(expected, rel=1e-5)


def test_the_rank_correlation_is_spearmans_with_ties():
    a, b = np.asarray([1.0, 2, 2, 5, 3]), np.asarray([2.0, 1, 4, 4, 4])
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, np.ones(5)) == 0
