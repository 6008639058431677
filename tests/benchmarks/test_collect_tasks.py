from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from rankadaptor_optuna.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.tasks import meta_task


@pytest.fixture(scope="module")
def collecting():
    from benchmarks.tasks import collect

    return collect


@pytest.fixture(scope="module")
def spec(collecting):
    small = TrainingConfig(6, 4, 3e-3)
    dense = collecting.Dense("docs", 4, 32, heads=4, kv_heads=2, intermediate=48, training=small)
    return collecting.TaskSpec("tiny", dense, collecting.Damage("taylor", 0.4), small)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def test_there_are_enough_tasks_and_none_of_a_model_that_is_raced_on(collecting):
    from benchmarks.tasks import recovery as recovery_tasks

    specs = collecting.specs()
    assert len({spec.name for spec in specs}) == len(specs) >= 40
    raced = {spec.family for spec in (*recovery_tasks.TEST, *recovery_tasks.DEVELOPMENT)}
    assert not raced & {spec.family for spec in specs}
    assert {spec.dense.text for spec in specs} == {"wikitext2", "alpaca", "docs", "questions"}
    assert {spec.damage.kind for spec in specs} == {"taylor", "rough", "even"}
    assert {len({spec.recovery.steps for spec in specs}), len({spec.candidates for spec in specs})} == {3, 4}
    depths = {spec.dense.n_layers for spec in specs}
    assert (min(depths), max(depths)) == (6, 24)


@pytest.mark.parametrize("candidates", [(2, 4, 8), (0, 4, 8, 16, 32)])
def test_configurations_are_uniform_random_and_smooth_within_the_budget(collecting, candidates):
    space = RankSpace(12, candidates, "uniform:4", costs=np.linspace(1, 2, 12))
    found = collecting.configurations(space, 60)
    assert found[0] == space.uniform()
    assert all(space.is_feasible(ranks) for ranks in found)
    assert len({tuple(ranks.values()) for ranks in found}) == 60
    steps = np.asarray([np.abs(np.diff(list(ranks.values()))).sum() for ranks in found[1:]])
    rough, smooth = np.sort(steps)[::-1][:25], np.sort(steps)[:25]
    assert np.median(smooth) < 0.6 * np.median(rough)
    assert found == collecting.configurations(space, 60)


def test_fewer_configurations_than_asked_are_no_trouble(collecting):
    assert len(collecting.configurations(RankSpace(3, (2, 4), "uniform:4"))) <= 8


def test_a_task_is_collected_in_parts_and_read_back(collecting, spec, cache, tmp_path, monkeypatch):
    collecting.collect(spec, tmp_path, 5, cache)
    file = collecting.collect(spec, tmp_path, 12, cache)
    whole = collecting.collect(spec, tmp_path / "whole", 12, cache)
    head, rows = collecting._read(file)
    assert np.asarray(rows) == pytest.approx(np.asarray(collecting._read(whole)[1]), abs=2e-5)
    assert head["cpu_seconds"] > 0
    assert head["pruned_loss"] > 0
    monkeypatch.setattr(collecting, "load_task", None)
    assert collecting.collect(spec, tmp_path, 12, cache) == file  # nothing left to do
    task = collecting.read_task(file)
    assert task.ranks[0].tolist() == [8] * 4
    assert task.scores.tolist() == [-row[-1] for row in rows]
    assert task.grid.sensitivity.tolist() == head["sensitivity"]
    assert len(set(head["sensitivity"])) == 4


def test_a_task_is_not_collected_until_it_is_whole(collecting, spec, cache, tmp_path, monkeypatch):
    broken = collecting.load_task(spec, cache)
    losses = broken.losses

    def stopped(configurations, seed):
        if (tmp_path / "tiny.csv.part").exists():
            raise KeyboardInterrupt
        return losses(configurations, seed)

    monkeypatch.setattr(broken, "losses", stopped)
    with monkeypatch.context() as patch:
        patch.setattr(collecting, "load_task", lambda *_: broken)
        with pytest.raises(KeyboardInterrupt):
            collecting.collect(spec, tmp_path, 12, cache)
    assert list(collecting.files(tmp_path)) == []
    file = collecting.collect(spec, tmp_path, 12, cache)
    assert list(tmp_path.iterdir()) == list(collecting.files(tmp_path)) == [file]


def test_a_task_of_other_settings_is_not_mixed_with_it(collecting, spec, cache, tmp_path):
    collecting.collect(spec, tmp_path, 2, cache)
    other = dataclasses.replace(spec, candidates=(2, 4, 6))
    with pytest.raises(ValueError, match=r"tiny\.csv is of other settings; move it away"):
        collecting.collect(other, tmp_path, 4, cache)


def test_as_a_study_it_is_the_same_task(collecting, spec, cache, tmp_path):
    file = collecting.collect(spec, tmp_path, 12, cache)
    storage = optuna.storages.InMemoryStorage()
    for _ in range(2):  # once is enough
        collecting.add_study(file, storage)
    study = optuna.load_study(study_name="tiny", storage=storage)
    found, expected = meta_task(study), collecting.read_task(file)
    assert len(study.trials) == 12
    assert (found.name, found.family) == (expected.name, expected.family) == ("tiny", "docs-4x32")
    np.testing.assert_array_equal(found.ranks, expected.ranks)
    np.testing.assert_array_equal(found.scores, expected.scores)
    for name, array in expected.grid.tensors.items():
        np.testing.assert_array_equal(found.grid.tensors[name], array)


def test_the_published_studies_are_the_collected_tasks(collecting, tmp_path):
    journal = tmp_path / "tasks.journal"
    journal.write_bytes(gzip.decompress((collecting.FOLDER / "tasks.journal.gz").read_bytes()))
    storage = JournalStorage(JournalFileBackend(str(journal)))
    files = list(collecting.files())
    assert optuna.get_all_study_names(storage) == [file.stem for file in files]
    for file in files:
        study = optuna.load_study(study_name=file.stem, storage=storage)
        trials = study.get_trials(deepcopy=False)
        task = collecting.read_task(file)
        assert [list(trial.params.values()) for trial in trials] == task.ranks.tolist()
        assert [-trial.value for trial in trials] == task.scores.tolist()
        assert list(study.user_attrs[SENSITIVITY_ATTR].values()) == task.grid.sensitivity.tolist()


def test_a_task_collected_before_sensitivities_were_gets_them_without_another_recovery(
    collecting, spec, cache, tmp_path, monkeypatch
):
    file = collecting.collect(spec, tmp_path, 3, cache)
    whole = file.read_text()
    head, rows = collecting._read(file)
    known = head.pop("sensitivity")
    file.write_text("\n".join([f"# {json.dumps(head)}", *whole.splitlines()[1:], ""]))
    monkeypatch.setattr("benchmarks.tasks.recovery.RecoveryTask.losses", None)
    collecting.collect(spec, tmp_path, 3, cache)
    again, same = collecting._read(file)
    assert again["sensitivity"] == pytest.approx(known)
    assert same == rows
    assert list(tmp_path.iterdir()) == [file]
