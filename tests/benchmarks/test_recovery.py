from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.tasks import models, recovery, texts
from benchmarks.tasks.ranks import random_ranks, weighted_ranks
from benchmarks.tasks.specs import DEVELOPMENT, IMPLEMENTED, TEST, TINY, Damage
from rankadaptor_optuna.pruning import load_pruned
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.sensitivity import sensitivities
from rankadaptor_optuna.recovery.train import TrainingConfig, train

TRAINING = TrainingConfig(5, 2, 1e-2, max_grad_norm=0.1)  # so low that it always clips
DENSE = dataclasses.replace(TINY.dense, training=TrainingConfig(6, 4, 3e-3))
SPEC = dataclasses.replace(TINY, dense=DENSE, recovery=TRAINING, candidates=(0, 2, 4, 6), budget="uniform:4")
CONFIGURATIONS = [{0: 2, 1: 6, 2: 0, 3: 4}, {0: 4, 1: 4, 2: 4, 3: 4}, {0: 0, 1: 0, 2: 6, 3: 2}]


HELD_OUT = 16


@pytest.fixture(scope="module", autouse=True)
def _few_blocks():
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (models, recovery):
            monkeypatch.setattr(module, "HELD_OUT", HELD_OUT)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture
def task(cache):
    return recovery.load_task(SPEC, cache)


@pytest.fixture(scope="module")
def parts():
    return texts.read_parts("docs")


def losses_of_the_package(cache, parts, training, held_out):
    model = load_pruned(next(cache.glob("*taylor*")))
    for ranks in CONFIGURATIONS:
        with attached(model, lora_config(ranks), seed=3) as adapted:
            train(adapted, texts.byte_blocks(parts.recovery), training, seed=3)
            yield block_losses(adapted, held_out).mean()


@pytest.mark.parametrize(
    ("changes", "report"), [({}, False), ({"warmup": 2, "weight_decay": 0.5, "linear_decay": True}, True)]
)
def test_a_loss_is_that_of_the_packages_own_recovery(task, cache, parts, changes, report):
    training = dataclasses.replace(TRAINING, **changes)
    task.spec = dataclasses.replace(SPEC, recovery=training)
    held_out = texts.byte_blocks(parts.report if report else parts.validation, HELD_OUT)
    found = task.losses(CONFIGURATIONS, seed=3, report=report)
    assert found == pytest.approx([*losses_of_the_package(cache, parts, training, held_out)], abs=2e-5)
    assert max(found) < task.pruned_loss - 0.01


def test_sensitivities_are_those_of_the_packages_own_recovery(task, cache, parts):
    held_out = Examples.of_blocks(texts.byte_blocks(parts.validation, HELD_OUT))
    model = load_pruned(next(cache.glob("*taylor*")))
    with attached(model, lora_config(task.space.uniform()), seed=3) as adapted:
        train(adapted, texts.byte_blocks(parts.recovery), TRAINING, seed=3)
        expected = task.space.by_module(sensitivities(adapted, held_out))
    found = task.sensitivity(seed=3)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-3, abs=1e-6)


def test_a_loss_does_not_depend_on_the_configurations_beside_it(task, monkeypatch):
    seeds = [0, 1, 0]
    together = task.losses([*CONFIGURATIONS, dict.fromkeys(range(4), 12)], [*seeds, 2])[:3]
    monkeypatch.setattr(recovery, "TOGETHER", 1)
    assert task.losses(CONFIGURATIONS, seeds) == pytest.approx(together, abs=2e-5)


def test_no_adapter_leaves_the_pruned_model(task):
    assert task.losses([dict.fromkeys(range(4), 0)], seed=0)[0] == pytest.approx(task.pruned_loss, abs=1e-6)


def test_the_space_counts_the_parameters_that_an_adapter_trains(task, cache):
    with attached(load_pruned(next(cache.glob("*taylor*"))), lora_config(CONFIGURATIONS[0]), seed=0) as adapted:
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert task.space.cost(CONFIGURATIONS[0]) == trained


NOT_IMPLEMENTED = {"micro_batch_size": 1, "gradient_checkpointing": True, "epochs": 2.0}


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(TrainingConfig)} - {*IMPLEMENTED}))
def test_settings_that_the_tasks_do_not_implement_are_refused(name):
    training = dataclasses.replace(TRAINING, **{name: NOT_IMPLEMENTED[name]})
    with pytest.raises(ValueError, match=f"do not implement {name}="):
        dataclasses.replace(SPEC, recovery=training)


def test_other_kinds_of_pruning_and_biases_are_refused():
    with pytest.raises(ValueError, match="do not implement kind='depth'"):
        Damage("depth", 0.5)
    with pytest.raises(ValueError, match="do not implement linear layers with a bias"):
        recovery._Stacked(torch.nn.Linear(2, 2))


def test_rough_pruning_hits_half_of_the_layers_and_even_pruning_all(cache):
    def space(kind):
        return recovery.load_task(dataclasses.replace(SPEC, damage=Damage(kind, 0.5)), cache).space

    rough, even = space("rough"), space("even")
    assert sorted(rough.profile)[:2] == [0, 0]
    assert min(sorted(rough.profile)[2:]) > 0.4
    assert len(set(even.costs)) == 1


def test_the_parts_of_a_text_are_disjoint(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKADAPTOR_DATA", str(tmp_path))
    (tmp_path / "wikitext2").mkdir()
    lines = [f"line {i} " + "word " * 20 for i in range(1000)]
    for name, part in (("validation", lines[:500]), ("test", lines[500:])):
        (tmp_path / "wikitext2" / f"{name}.txt").write_text("\n".join(part) + "\n")
    parts = dataclasses.astuple(texts.read_parts("wikitext2"))
    numbers = [[line.split()[1] for p in part for line in p.splitlines() if line.startswith("line")] for part in parts]
    assert sorted(int(n) for part in numbers for n in part) == [*range(1000)]
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl is missing; set RANKADAPTOR_DATA"):
        texts.read_parts("alpaca")
    with pytest.raises(ValueError, match="no text named 'novel'"):
        texts.read_parts("novel")


def test_allocations_use_the_budget(task):
    rng, space = np.random.default_rng(0), task.space
    found = [weighted_ranks(space, np.linspace(1, 3, 4)), *(random_ranks(space, rng) for _ in range(20))]
    for ranks in found:
        assert space.is_feasible(ranks)
        assert space.cost(ranks) > 0.85 * space.budget


def test_the_race_is_run_on_families_that_development_never_saw():
    assert not {spec.family for spec in DEVELOPMENT} & {spec.family for spec in TEST}
