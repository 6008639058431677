from __future__ import annotations

import numpy as np
import pytest
import torch

from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.surrogate.features import RankGrid
from rankadaptor_optuna.surrogate.meta import MetaTask, meta_train

CANDIDATES = (2, 4, 6, 8, 10, 12)


def world(seed):
    """A task of its own depth and scale. In all of them only one place in depth matters, and saturates there."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 14))
    grid = RankGrid.from_space(RankSpace(n, CANDIDATES, "uniform:6"))
    weight = np.exp(-0.5 * ((grid.depth - 0.35) / 0.08) ** 2) * rng.uniform(0.8, 1.2, n)

    def score(ranks):
        return (weight * np.minimum(ranks, 6)).sum(1) + 0.1 * (weight * ranks).sum(1)

    def draw(m):
        return rng.choice(CANDIDATES, (m, n)).astype(float)

    return grid, score, draw


def task(seed, n_trials=24):
    grid, score, draw = world(seed)
    ranks = draw(n_trials)
    return MetaTask(grid, ranks, 10.0**seed * score(ranks))


def rank_correlation(prior, seed, n_trials=5):
    grid, score, draw = world(seed)
    model, ranks, test = PerformanceModel(grid, prior=prior), draw(n_trials), draw(100)
    model.update(ranks, score(ranks))
    a, b = model.predict(test)[0], score(test)
    return np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]


@pytest.fixture(scope="module")
def learned():
    losses = []
    settings = {"max_epochs": 40, "hidden": 16, "learning_rate": 1e-2}
    prior = meta_train([task(i) for i in range(12)], **settings, progress=lambda epoch, loss: losses.append(loss))
    return prior, losses


def test_the_held_out_loss_falls(learned):
    prior, losses = learned
    assert min(losses) < losses[0] - 0.5
    assert np.abs(prior.mean).max() > 0.1  # not only the features but what to expect of them


def test_a_learned_prior_helps_on_unseen_tasks_after_five_trials(learned):
    unseen = range(100, 112)
    with_prior = np.mean([rank_correlation(learned[0], seed) for seed in unseen])
    without = np.mean([rank_correlation(None, seed) for seed in unseen])
    assert with_prior > without + 0.2


def test_the_same_seed_learns_the_same_prior_and_leaves_torchs_generator_alone():
    tasks, settings = [task(i) for i in range(3)], {"max_epochs": 2, "hidden": 4, "n_features": 3}
    state = torch.random.get_rng_state()
    priors = [meta_train(tasks, seed=seed, **settings) for seed in (1, 1, 2)]
    assert (torch.random.get_rng_state() == state).all()
    a, b, other = (p.mlp.weights[0] for p in priors)
    assert a.shape == (3, 4)
    assert priors[0].mean.shape == priors[0].std.shape == (3,)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(priors[0].mean, priors[1].mean)
    assert (a != other).any()


def test_torchs_default_device_and_dtype_do_not_matter(foreign_torch):
    tasks, settings = [task(i) for i in range(3)], {"max_epochs": 2, "hidden": 4, "n_features": 3}
    expected = meta_train(tasks, **settings)
    foreign_torch()
    found = meta_train(tasks, **settings)
    np.testing.assert_array_equal(found.mlp.weights[0], expected.mlp.weights[0])
    np.testing.assert_array_equal(found.mean, expected.mean)


def test_training_stops_when_the_held_out_tasks_gain_nothing():
    epochs = []
    noise = [MetaTask(t.grid, t.ranks, np.random.default_rng(0).standard_normal(24)) for t in (task(0), task(1))]
    meta_train(noise, max_epochs=40, patience=2, hidden=4, learning_rate=0.1, progress=lambda e, x: epochs.append(e))
    assert len(epochs) < 40


@pytest.mark.parametrize("tasks", [[], [task(0)], [task(0), task(1, n_trials=1)]])
def test_too_few_tasks_or_trials_are_refused(tasks):
    with pytest.raises(ValueError, match=f"at least two tasks of at least two trials, got {len(tasks)} tasks"):
        meta_train(tasks)
