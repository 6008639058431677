from __future__ import annotations

import pytest

from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.texts import Texts


@pytest.fixture
def smollm2(monkeypatch, texts):
    from benchmarks.tasks import smollm2 as smollm2_task

    monkeypatch.setattr(smollm2_task, "load_texts", lambda: Texts(texts[:6], texts[6:9], texts[9:]))
    return smollm2_task


@pytest.fixture
def task(smollm2, model, tokenizer, texts):
    """The task with a tiny model in SmolLM2's place."""
    spec = smollm2.SmolLM2Spec("tiny", "smollm2", 0.3, TrainingConfig(4, 2, 1e-2), length=32, held_out=4)
    pruned = prune(model, tokenizer, ratio=spec.ratio, calibration=texts, sample_length=32, multiple_of=8).model
    return smollm2.SmolLM2Task(spec, pruned, tokenizer, dense_loss=1.0)


def test_a_loss_is_after_a_recovery_with_its_own_ranks_and_seed_and_leaves_the_model_alone(task):
    small, large = (dict.fromkeys(task.space.layers, rank) for rank in (2, 12))
    found = task.losses([small, large, large], [0, 0, 1])
    assert len({*found, task.pruned_loss}) == 4
    assert max(found) < task.pruned_loss
    assert found == task.losses([small, large, large], [0, 0, 1])
    assert task.losses([large], [1], report=True) != found[2:]
    assert task.losses([large], 1) == found[2:]


def test_it_is_collected_as_a_family_of_its_own_and_only_when_asked_for(task, smollm2, tmp_path, monkeypatch):
    from benchmarks.tasks import collect as collect_tasks

    monkeypatch.setattr(collect_tasks, "load_smollm2", lambda spec, cache: task)
    file = collect_tasks.collect(task.spec, tmp_path, 3)
    collected = collect_tasks.read_task(file)
    assert (collected.name, collected.family) == ("tiny", "smollm2")
    assert collected.ranks[0].tolist() == [8] * len(task.space.layers)
    assert -collected.scores[:1] == pytest.approx(task.losses([task.space.uniform()], [0]), abs=1e-6)
    assert collect_tasks.read_pruned_loss(file) == task.pruned_loss
    assert smollm2.SMOLLM2.name not in {spec.name for spec in collect_tasks.specs()}
