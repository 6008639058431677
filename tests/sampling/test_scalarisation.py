from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.study import StudyDirection

from rankadaptor_optuna import RankAdaptorSampler
from rankadaptor_optuna.sampling.scalarisation import scalarised
from tests.sampling.common import SPACE, ranks_of, score

UP, DOWN = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE


class Weights:
    """A generator that draws given weights."""

    def __init__(self, *weights):
        self.weights = np.asarray(weights)

    def dirichlet(self, alpha):
        assert alpha.tolist() == [1] * len(self.weights)
        return self.weights


@pytest.mark.parametrize(("direction", "scores"), [(UP, [1, 3, 2]), (DOWN, [-1, -3, -2])])
def test_one_objective_is_the_score(direction, scores):
    assert scalarised(np.asarray([[1.0], [3.0], [2.0]]), [direction], None).tolist() == scores


def test_several_objectives_are_joined_by_the_augmented_chebyshev_function_of_distances_to_the_ideal_point():
    values = np.asarray([[0.0, 30.0], [2.0, 10.0]])  # distances to the best, in ranges: (1, 1), (0, 0)
    assert scalarised(values, [UP, DOWN], Weights(0.25, 0.75)) == pytest.approx([-0.75 - 0.05, 0])
    values = np.asarray([[0.0, 10.0], [2.0, 30.0]])  # (1, 0), (0, 1)
    assert scalarised(values, [UP, DOWN], Weights(0.25, 0.75)) == pytest.approx([-0.2625, -0.7875])


def test_an_objective_that_is_always_the_same_does_not_matter():
    assert scalarised(np.asarray([[0.0, 5.0], [2.0, 5.0]]), [UP, UP], Weights(0.5, 0.5)) == pytest.approx([-0.525, 0])


def test_the_ends_of_the_front_are_reached():
    x = np.linspace(0, 1, 21)
    front = np.stack([x, 1 - x], axis=1)
    best = [int(scalarised(front, [UP, UP], np.random.default_rng(seed)).argmax()) for seed in range(200)]
    assert np.quantile(best, [0.05, 0.95]) == pytest.approx([1, 19], abs=1)


def test_a_concave_region_of_the_front_is_reached():
    x = np.linspace(0, 1, 11)
    front = np.stack([x**2, (1 - x) ** 2], axis=1)  # any weighted sum is highest at one of its ends
    best = {int(scalarised(front, [UP, UP], np.random.default_rng(seed)).argmax()) for seed in range(60)}
    assert {4, 5, 6} <= best


def test_two_objectives_spread_over_the_front_within_the_budget():
    def both(trial):
        ranks = SPACE.suggest(trial)
        return float(score(ranks)), SPACE.cost(ranks)

    late = []
    for seed in range(4):
        sampler = RankAdaptorSampler(SPACE, prior=None, seed=seed)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        study.optimize(both, n_trials=20)
        assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)
        costs = [t.values[1] / SPACE.budget for t in study.best_trials]
        assert len(costs) >= 5
        assert min(costs) < 0.5 < 0.9 < max(costs)
        late += [(t.values[0], 8 * t.values[1] / SPACE.budget) for t in study.trials[10:]]
    # nearer to a uniform rank (a fraction, too) of the same cost than to random ranks, which are worse by 11
    assert np.mean([value - score(dict.fromkeys(range(8), rank)) for value, rank in late]) > -5.5
