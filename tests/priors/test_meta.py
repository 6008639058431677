from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch
from scipy import stats

from rankadaptor_optuna import PerformanceModel, RankSpace, __version__
from rankadaptor_optuna.priors.meta import MetaTask, meta_train, transfer
from rankadaptor_optuna.surrogate.grid import RankGrid
from rankadaptor_optuna.surrogate.statistics import rank_correlation

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


def correlation(prior, seed, n_trials=5):
    grid, score, draw = world(seed)
    model, ranks, test = PerformanceModel(grid, prior=prior), draw(n_trials), draw(100)
    model.update(ranks, score(ranks))
    return rank_correlation(model.predict(test)[0], score(test))


@pytest.fixture(scope="module")
def learned():
    torch.set_num_threads(1)  # this fixture is set up before the one that limits the threads of each test
    losses = []
    settings = {"max_epochs": 25, "hidden": 16, "learning_rate": 1e-2}
    prior = meta_train([task(i) for i in range(12)], **settings, progress=lambda epoch, loss: losses.append(loss))
    return prior, losses


def test_the_held_out_loss_falls(learned):
    prior, losses = learned
    assert min(losses) < losses[0] - 0.5
    assert np.abs(prior.mean).max() > 0.1  # not only the features but what to expect of them


def test_a_learned_prior_helps_on_unseen_tasks_after_five_trials(learned):
    unseen = range(100, 112)
    with_prior = np.mean([correlation(learned[0], seed) for seed in unseen])
    without = np.mean([correlation(None, seed) for seed in unseen])
    assert with_prior > without + 0.2


def test_a_bad_prior_costs_little_and_soon_nothing(learned):
    misleading = replace(learned[0], mean=-learned[0].mean)

    def cost(n_trials):
        unseen = range(100, 124)
        return np.mean([correlation(None, s, n_trials) - correlation(misleading, s, n_trials) for s in unseen])

    assert cost(2) > 0.05  # it does mislead
    assert cost(5) < 0.12
    assert abs(cost(12)) < 0.03
    assert abs(cost(25)) < 0.03


def test_the_card_holds_tasks_time_and_transfer():
    tasks = [replace(task(i, 20 + i), name=f"s{i}") for i in range(10)]
    card = meta_train(tasks, max_epochs=2, hidden=4).card
    assert card["tasks"] == [{"name": f"s{i}", "layers": task(i).grid.n_layers, "trials": 20 + i} for i in range(10)]
    assert datetime.fromisoformat(card["made"]).tzinfo is not None
    assert card["version"] == __version__
    held = card["held_out"]
    assert len(held["tasks"]) == 2
    assert held["gain"] == pytest.approx(held["with_prior"] - held["without"], abs=1e-3)


def test_transfer_is_measured_on_the_trials_after_the_first_few(learned):
    unseen = [task(seed) for seed in range(100, 106)]
    found = transfer(unseen, learned[0], n_first=5)
    assert found["gain"] > 0.2
    assert found["with_prior"] == pytest.approx(np.mean([row["with_prior"] for row in found["tasks"]]), abs=1e-3)
    first = unseen[0]
    model = PerformanceModel(first.grid, prior=learned[0])
    model.update(first.ranks[:5], first.scores[:5])
    expected = stats.spearmanr(model.predict(first.ranks[5:])[0], first.scores[5:]).statistic
    assert found["tasks"][0]["with_prior"] == pytest.approx(expected, abs=1e-4)
    short = [replace(first, ranks=first.ranks[:5], scores=first.scores[:5])]
    assert transfer(short, learned[0])["gain"] is None


@pytest.mark.parametrize("n_families", [1, 3, 10])
def test_a_family_is_held_out_whole(n_families):
    tasks = [replace(task(i), name=str(i), family=str(i % n_families)) for i in range(10)]
    found = [meta_train(tasks, max_epochs=1, hidden=4, seed=seed).card["held_out"]["tasks"] for seed in range(4)]
    for held in ([int(row["name"]) for row in rows] for rows in found):
        families = {i % n_families for i in held}
        if n_families > 1:
            assert sorted(held) == [i for i in range(10) if i % n_families in families]
        assert 1 <= len(held) <= 4


def test_effects_of_ordinary_parameters_are_not_taken_for_those_of_ranks():
    noisy = []
    for i in range(12):
        plain = task(i)
        points = np.random.default_rng(i).random((len(plain.scores), 1))
        noisy.append(replace(plain, scores=plain.scores + 3 * plain.scores.std() * points[:, 0], points=points))
    settings = {"max_epochs": 25, "hidden": 16, "learning_rate": 1e-2}
    knowing, ignorant = (
        meta_train(tasks, **settings) for tasks in (noisy, [replace(each, points=None) for each in noisy])
    )
    unseen = range(100, 112)
    knows, does_not = (np.mean([correlation(p, seed) for seed in unseen]) for p in (knowing, ignorant))
    assert knows > does_not + 0.15


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


def test_a_prior_does_not_depend_on_the_tasks_sensitivities():
    tasks = [task(i) for i in range(4)]
    told = [replace(t, grid=replace(t.grid, sensitivity=np.arange(t.grid.n_layers) + 1.0)) for t in tasks]
    a, b = (meta_train(some, max_epochs=2, hidden=4).checksum for some in (tasks, told))
    assert a == b
