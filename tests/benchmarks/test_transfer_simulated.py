from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def simulated():
    from benchmarks.race import transfer_simulated

    return transfer_simulated


@pytest.fixture(scope="module")
def file(simulated):
    return simulated.TASKS / "docs-13x48-taylor.csv"


@pytest.fixture(scope="module")
def task(simulated, file):
    return simulated.FittedTask(file)


def test_the_function_orders_recoveries_that_it_was_not_fitted_to(task):
    assert 0.8 < task.fidelity < 1


def test_reports_are_the_collected_losses_within_the_noise(simulated, task, file):
    collected = simulated.read_task(file)
    ranks = [dict(zip(task.space.layers, map(int, row), strict=True)) for row in collected.ranks]
    errors = np.add(task.losses(ranks, [0] * len(ranks), report=True), collected.scores)
    assert np.std(errors) <= task.noise < np.std(collected.scores) / 2


def test_a_trial_has_noise_of_its_own_seed_and_ranks(task):
    uniform, other = task.space.uniform(), dict.fromkeys(task.space.layers, 2)
    truth = task.losses([uniform, other], [0, 0], report=True)
    noise = np.subtract(task.losses([uniform, other, uniform, uniform], [0, 0, 1, 0]), truth + [truth[0]] * 2)
    assert noise[0] == noise[3]
    assert len(set(np.round(noise, 9))) == 3
    many = np.subtract(task.losses([uniform] * 500, range(500)), truth[0])
    assert np.std(many) == pytest.approx(task.noise, rel=0.1)
    assert np.mean(many) == pytest.approx(0, abs=0.2 * task.noise)


def test_a_family_has_the_mean_regrets_of_its_tasks(simulated):
    one, two = ({"who": {5: np.asarray(values)}} for values in ([0.0, 1.0], [1.0, 3.0]))
    assert simulated.joined([one, two])["who"][5].tolist() == [0.5, 2.0]
