from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import report
from benchmarks.paper import ablations
from benchmarks.paper import table as paper
from benchmarks.tasks.losses import Losses
from benchmarks.tasks.synthetic import Synthetic
from rankadaptor_optuna.jobs.results import COMPARED_METHODS, Row

LOSSES = {
    "no recovery": [4.0],
    "LoRA, uniform": [2.3, 2.41, 2.5],
    "AdaLoRA": [1.5, 1.6, 1.71],
    "EVA": [2.5, 2.61, 2.7],
    "Fisher-proportional": [2.0, 2.2, 2.1],
    "RankAdaptor": [2.0, 2.1, 2.2],
}


def rows(losses, parameters=1000):
    n = {method: len(values) for method, values in losses.items()}
    accuracies = {m: {"local_a": [0.5] * n[m], "local_b": [1 - x / 10 for x in losses[m]]} for m in COMPARED_METHODS}
    return [
        Row(m, losses[m], accuracies[m], {}, parameters if m != "no recovery" else 0, 2.0 if n[m] > 1 else 0.0)
        for m in COMPARED_METHODS
    ]


@pytest.fixture
def blocks():
    return {"llm-pruner-0.2": rows(LOSSES), "shortened-0.5": rows({**LOSSES, "LoRA, uniform": LOSSES["RankAdaptor"]})}


def test_differences_are_paired_by_seed_and_tell_wins_from_losses_and_ties(blocks):
    found = paper.paired(blocks)
    by = {(d["block"], d["measure"], d["RankAdaptor less"]): d for d in found}
    first = by["llm-pruner-0.2", "loss", "LoRA, uniform"]
    test = stats.ttest_rel(LOSSES["RankAdaptor"], LOSSES["LoRA, uniform"])
    assert first["p"] == pytest.approx(test.pvalue)
    low, high = test.confidence_interval(0.95)
    assert first["difference"] - first["half width"] == pytest.approx(low)
    assert first["difference"] + first["half width"] == pytest.approx(high)
    assert first["better on"] == "3 of 3"
    verdicts = {who: by["llm-pruner-0.2", "loss", who]["verdict"] for who in COMPARED_METHODS[:-1]}
    assert verdicts == dict(zip(COMPARED_METHODS[:-1], ["win", "win", "loss", "win", "tie"], strict=True))
    assert by["llm-pruner-0.2", "average", "AdaLoRA"]["verdict"] == "loss"
    same = by["shortened-0.5", "loss", "LoRA, uniform"]
    assert (same["difference"], same["p"], same["verdict"]) == (0, 1, "tie")
    totals = {(t["measure"], t["RankAdaptor against"]): t for t in paper.counted(found)}
    against = totals["loss", "LoRA, uniform"]
    assert (against["wins"], against["ties"], against["losses"]) == (1, 1, 0)
    assert totals["loss", "AdaLoRA"]["losses"] == 2


def test_accuracies_that_differ_by_the_same_on_every_seed_are_a_tie(blocks):
    coarse = {"local_a": [0.5, 0.6, 0.7]}
    found = [
        replace(
            row, accuracies={"local_a": [x + 0.02 for x in coarse["local_a"]]} if row.method == paper.OURS else coarse
        )
        for row in blocks["llm-pruner-0.2"]
    ]
    average = [d for d in paper.paired({"llm-pruner-0.2": found}) if d["measure"] == "average"]
    assert {(d["p"], d["p, Holm"], d["verdict"]) for d in average} == {(1, 1, "tie")}
    assert average[0]["difference"] == pytest.approx(0.02)


def test_holms_correction_is_that_of_the_textbook():
    assert paper.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paper.holm([0.6, 0.7]) == [1, 1]


def test_the_table_states_tasks_average_loss_and_each_rows_share_of_the_budget(blocks):
    lines = paper.table_rows(blocks)
    assert [line["recovery"] for line in lines] == [*COMPARED_METHODS, *COMPARED_METHODS]
    ours = lines[5]
    assert list(ours) == ["block", "recovery", "a", "b", "average", "loss", "parameters", "of budget", "seconds"]
    half = stats.t.ppf(0.975, 2) * np.std(LOSSES["RankAdaptor"], ddof=1) / 3**0.5
    assert ours["loss"] == f"2.1000 ±{half:.4f}"
    assert ours["b"] == f"79.0 ±{10 * half:.1f}"
    assert ours["average"] == f"64.50 ±{5 * half:.2f}"
    assert (ours["parameters"], ours["of budget"]) == ("1,000", "100.0%")
    assert lines[0]["loss"] == "4.0000"


def test_a_row_over_the_budget_and_a_loss_to_uniform_miss_their_goals(blocks):
    checks = paper.checks_of(blocks, paper.paired(blocks))
    assert [c["ok"] for c in checks.values()] == [True, True, True, True, True]
    over = [replace(row, parameters=1006) if row.method == "AdaLoRA" else row for row in blocks["shortened-0.5"]]
    worse = rows({**LOSSES, "RankAdaptor": [3.0, 3.1, 3.2]})
    bad = {"llm-pruner-0.2": worse, "shortened-0.5": over}
    checks = paper.checks_of(bad, paper.paired(bad))
    assert [c["ok"] for c in checks.values()] == [False, False, False, False, False]


def test_blocks_of_the_same_size_add_up_to_one_table(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    size = paper.Size()
    paper.report(blocks, size, part=False)
    for block, found in blocks.items():
        assert paper.finished_block(block, size, tmp_path / "paper_table.json") == found
    assert paper.finished_block(block, replace(size, steps=6), tmp_path / "paper_table.json") == []
    assert paper.finished_block(block, size, tmp_path / "none.json") == []
    assert paper.finished_block("no such block", size, tmp_path / "paper_table.json") == []


def test_performance_models_learn_from_the_same_trials_and_gains_are_over_uniform(tmp_path, monkeypatch):
    task = Synthetic("tiny", smooth=True, noise=0.0, seed=9)
    losses = Losses(task, tmp_path / "losses.csv")
    monkeypatch.setattr(ablations, "N_CANDIDATES", 300)
    found = ablations.performance_models(task, losses, 1, (5, 30))
    assert set(found) == {(name, n) for name in ablations.MODELS for n in (5, 30)}
    ours = found["ours", 30]
    assert min(ours["order"]) > 0.3
    best = task.losses([task.space.uniform()], [0], report=True)[0] - task.losses([task.optimum], [0], report=True)[0]
    assert 0 < np.mean(ours["gain"]) <= best
    rows = ablations.model_rows("tiny", found)
    less = np.subtract(ours["gain"], found["MLP 32-32-32", 30]["gain"]).mean()
    row = next(r for r in rows if (r["performance model"], r["trials"]) == ("ours", 30))
    assert row["gain less 32-32-32's"].startswith(f"{less:+.4f}")
