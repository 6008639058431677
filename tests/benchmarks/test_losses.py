from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.tasks.losses import Losses, Sensitivities, Trials
from benchmarks.tasks.synthetic import Synthetic
from rankadaptor_optuna import RankSpace


def test_a_loss_is_computed_once_and_refused_where_the_task_is_another(tmp_path):
    task = Synthetic("tiny", smooth=True, noise=0.5, seed=9)
    losses = Losses(task, tmp_path / "losses.csv")
    uniform = task.space.uniform()
    measured = losses([(uniform, 3), (uniform, 4), (uniform, 3)])
    assert measured == task.losses([uniform] * 3, [3, 4, 3])
    again = Losses(task, tmp_path / "losses.csv")
    assert (again([(uniform, 4)]), losses.n_computed, again.n_computed) == (measured[1:2], 2, 0)
    with pytest.raises(ValueError, match="move the file away"):
        Losses(Synthetic("other", smooth=True, noise=0.5, seed=10), tmp_path / "losses.csv")


def test_sensitivities_are_measured_once_a_seed_and_kept(tmp_path):
    asked = []

    def sensitivity(seed):
        asked.append(seed)
        return {0: seed + 1 / 3, 2: 1e-9, 3: -0.25}

    task = SimpleNamespace(space=RankSpace(4, layers=[0, 2, 3]), sensitivity=sensitivity)
    first = Sensitivities(task, tmp_path / "s.csv")
    found = [first(seed) for seed in (0, 5, 0)]
    assert found[0] == found[2] == {"layer_00_rank": 0.333333, "layer_02_rank": 1e-9, "layer_03_rank": -0.25}
    again = Sensitivities(task, tmp_path / "s.csv")
    assert [again(5), again(0)] == [found[1], found[0]]
    assert asked == [0, 5]


def test_trials_of_a_search_replace_its_earlier_ones(tmp_path):
    trials = Trials(tmp_path / "trials.csv")
    trials.put({("TPE", 0): [[2, 4], [4, 2]], ("GP", 0): [[2, 2]]})
    trials.put({("GP", 0): [[4, 4], [2, 4]]})
    again = Trials(tmp_path / "trials.csv")
    assert (again.of("TPE", 0), again.of("GP", 0), again.of("GP", 1)) == ([[2, 4], [4, 2]], [[4, 4], [2, 4]], [])
