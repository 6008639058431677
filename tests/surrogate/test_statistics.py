from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rankadaptor_optuna.surrogate.statistics import diverged, rank_correlation, standardise, t_interval


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


@pytest.mark.parametrize(
    ("scores", "bad"),
    [
        ([1.0, 1.1, 0.9, 1.2, -50.0], [4]),  # beyond the robust limit
        ([1.0, 1.1, 0.9, 1.2, -1.5], []),
        ([0.5] * 9 + [0.52] * 7 + [-100.0], [16]),  # most scores are equal
        ([-20.0, -21.0, *[-1e4] * 5], []),  # two good scores are too few
        ([-20.0, -21.0, -20.4, *[-1e4] * 5], [3, 4, 5, 6, 7]),  # the median has diverged, too
        ([-20.0, -20.001, -20.002, -23.0, -27.0, -31.0, -36.0, -40.0], []),  # a search that has found its optimum
        ([1e3, 1.0, 1.1, 0.9], []),  # far above is not bad
        ([-13.0, -25.0, -22.0, -17.5, *[-100.0] * 3], [4, 5, 6]),  # one bad outcome
        ([-13.0, -25.0, -22.0, -17.5, *[-1e6] * 9], [*range(4, 13)]),
        ([-13.0, -25.0, -22.0, -17.5, *[-1e12] * 9], [*range(4, 13)]),
        ([-13.0, -25.0, -22.0, -17.5, -100.0, -130.0, -160.0], []),  # as far, and not alike
        ([-13.0, -25.0, -22.0, -17.5, *[-40.0] * 3], []),  # alike, and not as far
        ([0.5] * 4 + [0.25] * 3, []),  # coarse scores
        ([3.0, 3.0], []),
        ([3.0], []),
        ([], []),
    ],
)
def test_diverged_scores_are_far_below_the_others(scores, bad):
    assert np.flatnonzero(diverged(np.asarray(scores, dtype=np.float64))).tolist() == bad
