from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs import compare as module
from rankadaptor_optuna.jobs.compare import METHODS, Row, compare, fisher_ranks, table, verdict
from rankadaptor_optuna.jobs.recipe import Evaluation, Recipe
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.objective import examples_of
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.references import fisher_information
from rankadaptor_optuna.recovery.tasks import TaskSuite

RECIPE = {
    "pruning": {"ratio": 0.2, "multiple_of": 8, "n_samples": 4, "sample_length": 32},
    "space": {"candidates": [2, 4, 8], "budget": "uniform:4"},
    "training": {"steps": 5, "learning_rate": 0.01},
}


@pytest.fixture
def recipe(model, tokenizer, texts, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(texts * 3))
    data = {"train": str(tmp_path / "text.txt"), "block_length": 32}
    return Recipe.from_dict({**RECIPE, "model": str(tmp_path / "dense"), "data": data})


@pytest.fixture
def searched(recipe, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    found = search(recipe, tmp_path / "out", trials=4, storage=url, say=lambda line: None)
    return url, tmp_path / "out" / "pruned", found.recommendation


def test_every_method_recovers_within_the_budget_on_fresh_seeds_and_unseen_text(searched, recipe, tokenizer, tmp_path):
    url, pruned, found = searched
    rows = compare(url, "search", tmp_path / "c", pruned=pruned, say=lambda line: None).rows
    assert [row.method for row in rows] == list(METHODS)
    by = {row.method: row for row in rows}
    model, _, _ = Recipe.from_dict(recipe.to_dict() | {"model": str(pruned)}).read_model()
    job = recipe.objective(model, tokenizer)
    for row in rows[1:]:
        assert len(set(row.losses)) == 3
        assert max(row.losses) < by["no recovery"].losses[0]
        assert 0.5 * job.space.budget < row.parameters <= 1.005 * job.space.budget, row.method
    assert by["RankAdaptor"].parameters == job.space.cost(found.ranks)
    assert by["no recovery"].parameters == 0
    report = examples_of(tokenizer, recipe.read_data().report, length=32, mask_prompt=True)
    with job.recovered(found.ranks, seed=1001) as adapted:
        assert by["RankAdaptor"].losses[1] == pytest.approx(block_losses(adapted, report).mean(), abs=1e-6)


def test_it_goes_on_where_it_stopped_and_writes_table_and_picture(searched, tmp_path, monkeypatch):
    url, pruned, _ = searched
    first = compare(url, "search", tmp_path / "c", pruned=pruned, seeds=2, say=lambda line: None)
    monkeypatch.setattr(module, "_recover_and_measure", lambda *args: pytest.fail("computed again"))
    assert compare(url, "search", tmp_path / "c", pruned=pruned, seeds=2, say=lambda line: None) == first
    assert (tmp_path / "c" / "compare.png").stat().st_size > 1000
    markdown = (tmp_path / "c" / "compare.md").read_text()
    assert all(f"| {method} |" in markdown for method in METHODS)
    stored = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert stored["rows"][-1]["losses"] == first.rows[-1].losses


def test_tasks_given_are_columns_scored_on_items_to_report_on(searched, tmp_path, local_task, monkeypatch):
    url, pruned, _ = searched
    parts = []
    real = TaskSuite.__init__
    monkeypatch.setattr(
        TaskSuite,
        "__init__",
        lambda self, *a, **kw: parts.append((kw["part"], kw["limit"])) or real(self, *a, **kw),
    )
    options = {"tasks": ["facts"], "include_path": str(local_task), "limit": 4}
    rows = compare(url, "search", tmp_path / "c", pruned=pruned, seeds=2, say=lambda line: None, **options).rows
    assert parts == [("report", 4)]
    assert set(rows[-1].accuracies) == {"facts"}
    assert len(rows[-1].accuracies["facts"]) == 2
    assert "facts" in table(rows)[0]


def test_the_recipes_tasks_and_its_metric_are_compared_by_default(recipe, tmp_path, local_task):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    evaluation = Evaluation(("facts",), "margin", limit=4, report_limit=6, include_path=str(local_task))
    search(replace(recipe, evaluation=evaluation), tmp_path / "out", trials=3, storage=url, say=lambda line: None)
    said = []
    rows = compare(url, "search", tmp_path / "c", pruned=tmp_path / "out" / "pruned", seeds=2, say=said.append).rows
    assert set(rows[-1].accuracies) == {"facts"}
    assert len(rows[-1].scores["margin"]) == 2
    assert "margin" in table(rows)[0]
    assert "By the margin that was searched on it is" in said[-1]


def test_the_command_prints_the_table_or_refuses_in_one_line(searched, tmp_path, capsys):
    url, pruned, _ = searched
    arguments = ["--storage", url, "--pruned", str(pruned)]
    assert main(["compare", "--out", str(tmp_path / "c"), "--seeds", "2", *arguments]) == 0
    out = capsys.readouterr().out
    assert "trainable parameters" in out
    assert "paired over 2 fresh seeds" in out
    for more, says in (
        (["--seeds", "1"], "seeds must be at least 2"),
        (["--study", "none"], "no study named 'none'"),
        (["--out", str(tmp_path / "out")], "belongs to other settings"),
    ):
        assert main(["compare", "--out", str(tmp_path / "x"), *arguments, *more]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_fisher_ranks_grow_with_a_layers_information_within_the_budget(searched, recipe, tokenizer):
    model, _, _ = Recipe.from_dict(recipe.to_dict() | {"model": str(searched[1])}).read_model()
    job = recipe.objective(model, tokenizer)
    ranks = fisher_ranks(job)
    assert job.space.is_feasible(ranks)
    information = fisher_information(job.model, job.train)
    order = sorted(ranks, key=lambda layer: information[layer])
    assert [ranks[layer] for layer in order] == sorted(ranks.values())


def test_the_verdict_says_wins_and_losses_alike():
    losses = {
        "no recovery": [4.0],
        "LoRA, uniform": [2.3, 2.41, 2.5],
        "AdaLoRA": [1.5, 1.6, 1.71],
        "EVA": [2.5, 2.61, 2.7],
        "Fisher-proportional": [2.0, 2.2, 2.1],
        "RankAdaptor": [2.0, 2.1, 2.2],
    }
    found = verdict([Row(method, losses[method], {}, {}, 10, 1.0) for method in METHODS])
    assert "margin" not in found
    scores = {method: {"margin": [-x for x in values]} for method, values in losses.items()}
    both = verdict([Row(method, losses[method], {}, scores[method], 10, 1.0) for method in METHODS])
    assert both.startswith(found)
    assert both.split("By the margin")[1].count("better than") == 2
    assert "WORSE than AdaLoRA (-0.4967 margin, 95% interval -0.5110 to -0.4823)" in both
    assert "better than LoRA, uniform (-26" in found
    assert "WORSE than AdaLoRA (+" in found
    assert "better than EVA" in found
    assert "not told apart from Fisher-proportional" in found


def test_a_score_that_differs_by_the_same_on_every_seed_is_not_called_better():
    scores = {method: [0.5, 0.52, 0.54] for method in METHODS} | {"RankAdaptor": [0.52, 0.54, 0.56]}
    found = verdict([Row(method, [2.0, 2.1, 2.3], {}, {"accuracy": scores[method]}, 10, 1.0) for method in METHODS])
    assert "not told apart from EVA (+0.0200 accuracy with every seed, which leaves no spread to judge by)" in found
    assert "better" not in found


def test_the_table_has_means_and_intervals():
    few = {"a": [0.1], "b": [0.3]}
    rows = [Row(method, [3.0], few, {}, 10, 1.0) for method in METHODS]
    rows[-1] = Row("RankAdaptor", [1.0, 1.0, 1.0], {"a": [0.5, 0.6, 0.7], "b": [0.7, 0.6, 0.5]}, {}, 1234567, 2.4)
    lines = table(rows)
    assert lines[0] == ["recovery", "perplexity", "a", "b", "average", "trainable parameters", "seconds"]
    half = 100 * 4.302652729911275 * np.std([0.5, 0.6, 0.7], ddof=1) / math.sqrt(3)
    assert lines[-1] == [
        "RankAdaptor",
        "2.72 ± 0.00",
        f"60.00 ± {half:.2f}",
        f"60.00 ± {half:.2f}",
        "60.00 ± 0.00",
        "1,234,567",
        "2",
    ]
    assert lines[1][2:5] == ["10.00", "30.00", "20.00"]


def test_a_method_over_the_budget_tries_again_with_less(searched, recipe, tokenizer, monkeypatch):
    model, _, _ = Recipe.from_dict(recipe.to_dict() | {"model": str(searched[1])}).read_model()
    job = recipe.objective(model, tokenizer)
    tried = []
    monkeypatch.setattr(module, "adapter_parameters", lambda adapted: 10**9 if len(tried) < 3 else 1)
    real = module.eva
    monkeypatch.setattr(module, "eva", lambda *a, rank, **kw: tried.append(rank) or real(*a, rank=rank, **kw))
    module._recover_and_measure("EVA", job, {}, 0, lambda adapted: {})
    assert tried == [4, 3, 2]
