from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.priors.pretraining import pretrain, reptile
from rankadaptor_optuna.surrogate.grid import RankGrid

SPACE = RankSpace(10, budget="uniform:8")


def score(ranks):
    return np.log2(1 + np.asarray(ranks)) @ np.linspace(0.2, 2, 10)


def configurations(n, seed=0):
    return np.random.default_rng(seed).choice(SPACE.candidates, (n, 10)).astype(float)


def tasks(n, n_layers=10, n_trials=24):
    """Studies of one kind of model: the deeper layers need rank more, each study on its own scale."""
    grid = RankGrid.from_space(RankSpace(n_layers))
    made = []
    for seed in range(n):
        rng = np.random.default_rng([8, seed])
        ranks = rng.choice(SPACE.candidates, (n_trials, n_layers)).astype(float)
        weights = np.linspace(0.2, 2, n_layers) * rng.uniform(0.5, 1.5, n_layers)
        made.append(MetaTask(grid, ranks, 10.0**seed * (weights * ranks).sum(1)))
    return made


def test_pretraining_predicts_the_tasks_common_part_before_the_first_trial():
    network = pretrain(tasks(8), steps=800)
    test = configurations(100, seed=1)
    model = PerformanceModel(SPACE, mode="paper", prior=network)
    assert np.corrcoef(model.predict(test)[0], score(test))[0, 1] > 0.8
    assert (network.n_steps, np.abs(network.moments).max()) == (0, 0)  # the optimiser starts afresh
    before = network.parameters.copy()
    model.update(test, -score(test))
    np.testing.assert_array_equal(network.parameters, before)  # the next study starts from it, too
    assert np.corrcoef(model.predict(test)[0], score(test))[0, 1] < 0


def opposed(seed, n_trials=24):
    """A study in which either the first or the last layers need rank, which of them only its trials can tell."""
    rng = np.random.default_rng([9, seed])
    ranks = rng.choice(SPACE.candidates, (n_trials, 10)).astype(float)
    return MetaTask(RankGrid.from_space(SPACE), ranks, (-1) ** seed * (np.linspace(-1, 1, 10) * ranks).sum(1))


def test_reptile_learns_more_than_an_untrained_network_from_few_trials():
    def correlation(network, n_trials=8):
        found = []
        for seed in range(100, 110):
            task = opposed(seed, n_trials + 60)
            model = PerformanceModel(SPACE, mode="paper", prior=network)
            model.update(task.ranks[:n_trials], task.scores[:n_trials])
            found.append(np.corrcoef(model.predict(task.ranks[n_trials:])[0], task.scores[n_trials:])[0, 1])
        return np.mean(found)

    network = reptile([opposed(seed) for seed in range(20)], iterations=250)
    assert correlation(network) > correlation(None) + 0.15
    assert (network.n_steps, np.abs(network.moments).max()) == (0, 0)


@pytest.mark.parametrize("learn", [partial(pretrain, steps=20), partial(reptile, iterations=3)])
def test_pretraining_is_reproducible(learn):
    networks = [learn(tasks(2), seed=seed).parameters for seed in (0, 0, 1)]
    np.testing.assert_array_equal(networks[0], networks[1])
    assert (networks[0] != networks[2]).any()


@pytest.mark.parametrize("learn", [pretrain, reptile])
@pytest.mark.parametrize("given", [[], [*tasks(1), *tasks(1, n_layers=9)], tasks(1, n_trials=0)])
def test_pretraining_needs_tasks_of_one_depth(given, learn):
    with pytest.raises(ValueError, match="meta-learning needs tasks with trials, all of one number of layers"):
        learn(given)
