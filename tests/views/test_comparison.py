from __future__ import annotations

import math

import numpy as np
import pytest

from rankadaptor_optuna.jobs.results import COMPARED_METHODS, OURS, Comparison, Row
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.views.comparison import comparison_table, comparison_verdict, write_comparison

LOSSES = {
    "no recovery": [4.0],
    "LoRA, uniform": [2.3, 2.41, 2.5],
    "AdaLoRA": [1.5, 1.6, 1.71],
    "EVA": [2.5, 2.61, 2.7],
    "Fisher-proportional": [2.0, 2.2, 2.1],
    "RankAdaptor": [2.0, 2.1, 2.2],
}


def comparison(rows, out=None):
    return Comparison(rows, {}, 100.0, (1, 2, 3), Ranks({0: 4}), Ranks({0: 4}), out)


def row(method, losses=None, accuracies=(), scores=(), parameters=10, **more):
    losses = LOSSES[method] if losses is None else losses
    return Row(method, losses, dict(accuracies), dict(scores), parameters, 2.4, **more)


def test_the_verdict_says_wins_and_losses_alike():
    text = comparison_verdict(comparison([row(method) for method in COMPARED_METHODS]))
    head, _, *verdicts = text.splitlines()
    assert head == "RankAdaptor by perplexity, paired differences on 3 fresh seeds:"
    assert [line.partition(":")[0] for line in verdicts] == [
        "* better than LoRA, uniform",
        "* WORSE than AdaLoRA",
        "* better than EVA",
        "* not distinguishable from Fisher-proportional",
    ]
    assert verdicts[0].endswith(": -26.16% (95% interval -27.22% to -25.10%)")


def test_a_recovery_that_is_worse_than_none_is_said_first():
    rows = [row(method, [1.0] if method == "no recovery" else None) for method in COMPARED_METHODS]
    text = comparison_verdict(comparison(rows))
    assert text.startswith("Recovery made the model WORSE than no recovery: perplexity 8.17 with the recommended ranks")


def test_the_verdict_says_where_trainable_parameters_differ():
    rows = [row(method, parameters=8 if method == "EVA" else 10) for method in COMPARED_METHODS]
    text = comparison_verdict(comparison(rows))
    assert text.count("trainable parameters") == 1
    line = next(line for line in text.splitlines() if "EVA" in line)
    assert line.endswith("), with +25.0% trainable parameters")


def test_the_verdict_is_also_about_the_searched_metric():
    scores = {method: {"margin": [-loss for loss in losses]} for method, losses in LOSSES.items()}
    text = comparison_verdict(comparison([row(method, scores=scores[method]) for method in COMPARED_METHODS]))
    by_metric = text.split("RankAdaptor by margin")[1]
    assert by_metric.count("better than") == 2
    assert "WORSE than AdaLoRA: -0.4967 (95% interval -0.5110 to -0.4823)" in by_metric


def test_a_score_that_differs_by_the_same_on_every_seed_is_not_called_better():
    accuracy = {method: [0.5, 0.52, 0.54] for method in COMPARED_METHODS} | {OURS: [0.52, 0.54, 0.56]}
    rows = [row(method, [2.0, 2.1, 2.3], scores={"accuracy": accuracy[method]}) for method in COMPARED_METHODS]
    text = comparison_verdict(comparison(rows))
    assert "not distinguishable from EVA: +0.0200 on every seed, no spread to judge by" in text
    assert "better" not in text


def test_the_table_has_means_and_intervals():
    rows = [row(method, [3.0], {"a": [0.1], "b": [0.3]}) for method in COMPARED_METHODS]
    accuracies = {"a": [0.5, 0.6, 0.7], "b": [0.7, 0.6, 0.5]}
    rows[-1] = row(OURS, [1.0, 1.0, 1.0], accuracies, parameters=1234567)
    head, first, *_, last = comparison_table(comparison(rows))
    assert head == ["recovery", "perplexity", "a (%)", "b (%)", "average (%)", "trainable parameters", "seconds"]
    half = f"{100 * 4.302652729911275 * np.std([0.5, 0.6, 0.7], ddof=1) / math.sqrt(3):.2f}"
    accuracy = f"60.00 ± {half}"
    assert last == [OURS, "2.72", accuracy, accuracy, "60.00", "1,234,567", "2"]
    assert first == ["no recovery", "20.09", "10.00", "30.00", "20.00", "10", "-"]


def test_the_table_has_total_parameters_where_every_row_does():
    rows = [row(method, total_parameters=134_500_000) for method in COMPARED_METHODS]
    assert comparison_table(comparison(rows))[1][-3:] == ["134.5M", "10", "-"]


def test_table_verdict_and_picture_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    found = comparison([row(method) for method in COMPARED_METHODS], tmp_path)
    write_comparison(found)
    text = (tmp_path / "compare.md").read_text()
    assert all(f"| {method} |" in text for method in COMPARED_METHODS)
    assert comparison_verdict(found) in text
    assert (tmp_path / "compare.png").stat().st_size > 1000
