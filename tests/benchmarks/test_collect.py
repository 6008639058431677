from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from benchmarks.tasks import collect
from benchmarks.tasks.specs import DEVELOPMENT, TEST
from benchmarks.tasks.synthetic import Synthetic
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.tasks import meta_task
from rankadaptor_optuna.surrogate.prior import PRETRAINED, load_prior


@pytest.fixture
def task(monkeypatch):
    """A known function in place of the recoveries."""
    function = Synthetic("function", smooth=True, noise=0.0, seed=1)
    task = SimpleNamespace(space=function.space, dense_loss=1.0, pruned_loss=3.0, asked=0)
    task.sensitivity = lambda seed: {layer: 0.1 + layer for layer in function.space.layers}

    def losses(configurations, seed):
        task.asked += len(configurations)
        return function.losses(configurations, [seed] * len(configurations))

    task.losses = losses
    monkeypatch.setattr(collect, "open_task", lambda spec, cache: task)
    return task


def test_no_task_is_of_a_family_that_is_raced_on():
    specs = collect.specs()
    assert len({spec.name for spec in specs}) == len(specs) == 48
    assert not {spec.family for spec in (*TEST, *DEVELOPMENT)} & {spec.family for spec in specs}


def test_the_shipped_prior_was_learned_from_the_collected_tasks_and_is_small():
    collected = {one.task.name for one in collect.collected()}
    assert {task["name"] for task in load_prior("pretrained").card["tasks"]} == collected
    assert PRETRAINED.stat().st_size < 1_000_000


@pytest.mark.parametrize("candidates", [(2, 4, 8), (0, 4, 8, 16, 32)])
def test_configurations_are_uniform_random_and_smooth_within_the_budget(candidates):
    space = RankSpace(12, candidates, "uniform:4", costs=np.linspace(1, 2, 12))
    found = collect.configurations(space, 60)
    assert found[0] == space.uniform()
    assert all(space.is_feasible(ranks) for ranks in found)
    assert len({tuple(ranks.values()) for ranks in found}) == 60
    steps = np.asarray([np.abs(np.diff(list(ranks.values()))).sum() for ranks in found[1:]])
    rough, smooth = np.sort(steps)[::-1][:25], np.sort(steps)[:25]
    assert np.median(smooth) < 0.6 * np.median(rough)


def test_a_task_is_collected_in_parts_and_read_back(task, tmp_path):
    spec = collect.specs()[0]
    collect.collect(spec, tmp_path, 5)
    file = collect.collect(spec, tmp_path, 12)
    assert task.asked == 12
    assert list(tmp_path.iterdir()) == [file]
    (found,) = collect.collected(tmp_path)
    assert found.task.ranks[0].tolist() == [8] * 24
    ranks = [dict(zip(task.space.layers, row, strict=True)) for row in found.task.ranks.astype(int).tolist()]
    assert found.task.scores == pytest.approx(-np.asarray(task.losses(ranks, 0)), abs=1e-6)
    assert found.relative[0] == 0
    assert (found.space, found.pruned_loss, found.task.family) == (task.space, 3.0, spec.family)
    file.rename(tmp_path / f"{collect.specs()[1].name}.csv")
    with pytest.raises(ValueError, match="has other settings; move it away"):
        collect.collect(collect.specs()[1], tmp_path, 12)


def test_as_a_study_it_is_the_same_task():
    storage = optuna.storages.InMemoryStorage()
    collected = collect.collected()[0]
    for _ in range(2):  # once is enough
        collect.add_study(collected, storage)
    found, expected = meta_task(optuna.load_study(study_name=collected.task.name, storage=storage)), collected.task
    assert (found.name, found.family) == (expected.name, expected.family)
    np.testing.assert_array_equal(found.ranks, expected.ranks)
    np.testing.assert_array_equal(found.scores, expected.scores)
    for name, array in expected.grid.tensors.items():
        np.testing.assert_array_equal(found.grid.tensors[name], array)
