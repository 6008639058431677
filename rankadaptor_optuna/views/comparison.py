"""A comparison of recoveries as a table, a verdict and files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.jobs.results import OURS, UNTRAINED, Comparison, PairedDifference
from rankadaptor_optuna.views.pictures import draw_comparison
from rankadaptor_optuna.views.style import as_count, as_mean, as_millions
from rankadaptor_optuna.views.tables import Table, from_columns, markdown_table

_VERDICTS = {"better": "better than", "worse": "WORSE than", "tie": "not distinguishable from"}


def comparison_table(comparison: Comparison) -> Table:
    """Returns a row per method: perplexity, searched metric, accuracies in percent, parameters and seconds.

    Measurements on several seeds are means ± half widths of their 95% t intervals.
    """
    rows = comparison.rows
    columns: dict[str, list[str]] = {
        "recovery": [row.method for row in rows],
        "perplexity": [as_mean([math.exp(loss) for loss in row.losses]) for row in rows],
    }
    for metric in rows[0].scores:
        columns[metric] = [as_mean(row.scores[metric], 4) for row in rows]
    for task in rows[0].accuracies:
        columns[f"{task} (%)"] = [_accuracy(row.accuracies[task]) for row in rows]
    if len(rows[0].accuracies) > 1:
        columns["average (%)"] = [_accuracy(np.mean(list(row.accuracies.values()), axis=0)) for row in rows]
    if all(row.total_parameters for row in rows):
        columns["parameters"] = [as_millions(row.total_parameters) for row in rows]
    columns["trainable parameters"] = [as_count(row.parameters) if row.parameters else "-" for row in rows]
    columns["seconds"] = ["-" if row.method in UNTRAINED else f"{row.seconds:.0f}" for row in rows]
    return from_columns(columns)


def _accuracy(shares: Sequence[float]) -> str:
    return as_mean([100 * share for share in shares])


def comparison_verdict(comparison: Comparison) -> str:
    """Returns a sentence on the recommended ranks against each reference, by perplexity and by the searched metric."""
    sentences = [f"On the same {len(comparison.seeds)} fresh seeds, {OURS} is"]
    for measure in ("loss", *comparison.row(OURS).scores):
        paired = [(method, comparison.paired(method, measure)) for method in comparison.references]
        verdicts = [f"{_VERDICTS[each.verdict]} {method} ({difference_text(each)})" for method, each in paired]
        sentences.append("; ".join(verdicts) + ".")
    return f" By the searched metric, {OURS} is ".join([" ".join(sentences[:2]), *sentences[2:]])


def difference_text(paired: PairedDifference) -> str:
    """Returns a paired difference and its 95% interval: ``perplexity -2.10%, 95% interval -2.40% to -1.80%``."""
    if paired.measure == "loss":
        name, mean, low, high = "perplexity", *(f"{math.expm1(x):+.2%}" for x in (paired.mean, *paired.interval))
    else:
        name, mean, low, high = paired.measure, *(f"{x:+.4f}" for x in (paired.mean, *paired.interval))
    interval = " on every seed: no spread to judge by" if paired.alike else f", 95% interval {low} to {high}"
    return f"{name} {mean}{interval}"


def write_comparison(comparison: Comparison) -> None:
    """Writes ``compare.md`` and ``compare.png`` into the comparison's folder."""
    text = f"{markdown_table(comparison_table(comparison))}\n\n{comparison_verdict(comparison)}\n"
    write_text(comparison.out / "compare.md", text)
    draw_comparison(comparison).savefig(comparison.out / "compare.png", dpi=120)
