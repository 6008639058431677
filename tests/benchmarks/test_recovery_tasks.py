from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from benchmarks.tasks import recovery as tasks
from rankadaptor_optuna.pruning import load_pruned
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.sensitivity import sensitivities
from rankadaptor_optuna.recovery.train import TrainingConfig, train

SPEC = tasks.TaskSpec(
    "tiny",
    tasks.Dense("docs", 4, 32, heads=4, kv_heads=2, intermediate=48, training=TrainingConfig(6, 4, 3e-3)),
    tasks.Damage("taylor", 0.4),
    TrainingConfig(5, 2, 1e-2, max_grad_norm=0.1),  # so low that it always clips
    candidates=(0, 2, 4, 6),
    budget="uniform:4",
)
CONFIGURATIONS = [{0: 2, 1: 6, 2: 0, 3: 4}, {0: 4, 1: 4, 2: 4, 3: 4}, {0: 0, 1: 0, 2: 6, 3: 2}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture
def task(cache):
    return tasks.load_task(SPEC, cache)


@pytest.mark.parametrize("report", [False, True])
def test_a_loss_is_that_of_the_packages_own_recovery(task, cache, report):
    parts = tasks.read_parts("docs")
    held_out = tasks._blocks(parts.report if report else parts.validation, tasks.HELD_OUT)
    found = task.losses(CONFIGURATIONS, seed=3, report=report)
    model = load_pruned(next(cache.glob("*taylor*")))
    for ranks, loss in zip(CONFIGURATIONS, found, strict=True):
        with attached(model, lora_config(ranks), seed=3) as adapted:
            train(adapted, tasks._blocks(parts.recovery), SPEC.recovery, seed=3)
            assert loss == pytest.approx(block_losses(adapted, held_out).mean(), abs=2e-5)
    assert max(found) < task.pruned_loss - 0.01


def test_a_loss_does_not_depend_on_its_company(task, monkeypatch):
    seeds = [0, 1, 0]
    together = task.losses([*CONFIGURATIONS, dict.fromkeys(range(4), 12)], [*seeds, 2])[:3]
    monkeypatch.setattr(tasks, "TOGETHER", 1)
    assert task.losses(CONFIGURATIONS, seeds) == pytest.approx(together, abs=2e-5)
    assert task.losses([], seed=0) == []


def test_no_adapter_leaves_the_pruned_model_and_another_seed_is_another_recovery(task):
    nothing = dict.fromkeys(range(4), 0)
    assert task.losses([nothing], seed=0)[0] == pytest.approx(task.pruned_loss, abs=1e-6)
    first, again, other = (task.losses(CONFIGURATIONS[:1], seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    assert task.losses([nothing], seed=0)[0] == pytest.approx(task.pruned_loss, abs=1e-6)


def test_models_are_made_once(task, cache, monkeypatch):
    monkeypatch.setattr(tasks, "_pretrained", None)
    monkeypatch.setattr(tasks, "_pruned", None)
    again = tasks.load_task(SPEC, cache)
    assert (again.dense_loss, again.pruned_loss) == (task.dense_loss, task.pruned_loss)
    assert again.losses(CONFIGURATIONS, seed=0) == task.losses(CONFIGURATIONS, seed=0)


def test_a_kept_model_is_what_another_machine_goes_on_with(cache, tmp_path, monkeypatch):
    first = tasks.load_task(SPEC, cache, kept=tmp_path)
    monkeypatch.setattr(tasks, "_models", None)
    again = tasks.load_task(SPEC, None, kept=tmp_path)
    assert again.dense_loss == first.dense_loss
    assert again.losses(CONFIGURATIONS, seed=0) == first.losses(CONFIGURATIONS, seed=0)
    with pytest.raises(ValueError, match="other settings"):
        tasks.load_task(dataclasses.replace(SPEC, budget="uniform:2"), None, kept=tmp_path)


def test_compiled_or_not_a_loss_is_the_same(task, cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # needs no C++ compiler
    compiled = tasks.load_task(SPEC, cache, compiled=True)
    asked = [*CONFIGURATIONS, *CONFIGURATIONS[:2]]  # fewer than are recovered together
    assert compiled.losses(asked, [0, 0, 0, 1, 1]) == pytest.approx(task.losses(asked, [0, 0, 0, 1, 1]), abs=2e-5)


def test_the_space_counts_what_an_adapter_trains(task, cache):
    model = load_pruned(next(cache.glob("*taylor*")))
    with attached(model, lora_config(CONFIGURATIONS[0]), seed=0) as adapted:
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert task.space.cost(CONFIGURATIONS[0]) == trained
    assert task.spec.family == "docs-4x32"


def test_rough_pruning_hits_half_of_the_layers_and_even_pruning_all(cache):
    def spaces(kind):
        return tasks.load_task(dataclasses.replace(SPEC, damage=tasks.Damage(kind, 0.5)), cache).space

    rough, even = spaces("rough"), spaces("even")
    assert sorted(rough.profile)[:2] == [0, 0]
    assert min(sorted(rough.profile)[2:]) > 0.4
    assert len(set(even.costs)) == 1
    assert max(even.costs) < max(rough.costs)


@pytest.mark.parametrize("text", ["wikitext2", "alpaca"])
def test_the_parts_of_a_text_are_disjoint(text, tmp_path):
    (tmp_path / text).mkdir()
    lines = [f"line {i} " + "word " * 20 for i in range(1000)]
    if text == "wikitext2":
        (tmp_path / text / "validation.txt").write_text("\n".join(lines[:500]) + "\n")
        (tmp_path / text / "test.txt").write_text("\n".join(lines[500:]))
    else:
        records = [{"instruction": line, "input": "", "output": "out"} for line in lines]
        (tmp_path / text / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    parts = dataclasses.astuple(tasks.read_parts(text, tmp_path))
    numbers = [[line.split()[1] for p in part for line in p.splitlines() if line.startswith("line")] for part in parts]
    assert sorted(int(n) for part in numbers for n in part) == [*range(1000)]
    assert len(numbers[0]) > len(numbers[1]) > len(numbers[2]) > 50


def test_questions_are_read_with_their_answers(tmp_path, monkeypatch):
    choices = {"choices": {"text": ["wrong", "right"], "label": ["A", "B"]}, "answerKey": "B"}
    records = {
        "gsm8k": {"question": "How many?", "answer": "Two."},
        "openbookqa": {"question_stem": "Which stem?", **choices},
        "arc_easy": {"question": "Which?", **choices},
        "arc_challenge": {"question": "Which?", **choices},
    }
    for name, record in records.items():
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / "train.jsonl").write_text(f"{json.dumps(record)}\n" * 500)
    parts = dataclasses.astuple(tasks.read_parts("questions", tmp_path))
    assert all(parts)
    text = "".join(passage for part in parts for passage in part)
    asked = ["How many?\nTwo.\n\n", "Which stem?\nright\n\n", "Which?\nright\n\n"]
    assert [text.count(each) for each in asked] == [500, 500, 1000]


def test_a_missing_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKADAPTOR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"validation\.txt is missing; set RANKADAPTOR_DATA"):
        tasks.read_parts("wikitext2")
    with pytest.raises(ValueError, match="no text named 'novel'"):
        tasks.read_parts("novel")


def test_allocations_use_the_budget(task):
    rng = np.random.default_rng(0)
    space = task.space
    found = [*tasks.structured_ranks(task).values(), *(tasks.random_ranks(space, rng) for _ in range(20))]
    for ranks in found:
        assert space.is_feasible(ranks)
        assert space.cost(ranks) > 0.85 * space.budget


def test_the_race_is_run_on_families_that_development_never_saw():
    specs = [*tasks.DEVELOPMENT, *tasks.TEST]
    assert len({spec.name for spec in specs}) == len(specs)
    assert not {spec.family for spec in tasks.DEVELOPMENT} & {spec.family for spec in tasks.TEST}


def test_a_description_says_how_well_a_task_discriminates(task):
    row = tasks.describe(task, n_random=3)
    assert row["pruned"] > row["u2"] > row["u16"]
    assert row["random mean"] >= row["min"]
    assert -1 <= row["rho"] <= 1
    assert torch.isfinite(torch.tensor([v for v in row.values() if not isinstance(v, str)])).all()


def test_sensitivities_are_those_of_the_packages_own_recovery(task, cache):
    parts = tasks.read_parts("docs")
    held_out = Examples.of_blocks(tasks._blocks(parts.validation, tasks.HELD_OUT))
    model = load_pruned(next(cache.glob("*taylor*")))
    with attached(model, lora_config(task.space.uniform()), seed=3) as adapted:
        train(adapted, tasks._blocks(parts.recovery), SPEC.recovery, seed=3)
        expected = task.space.by_module(sensitivities(adapted, held_out))
    found = task.sensitivity(seed=3)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-3, abs=1e-6)
    assert task.losses(CONFIGURATIONS[:1], seed=3) == task.losses(CONFIGURATIONS[:1], seed=3)
