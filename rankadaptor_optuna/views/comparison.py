"""A comparison of recoveries as a table, a verdict and files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.jobs.results import NONE, OURS, UNTRAINED, Comparison, PairedDifference
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
    """Returns how the recommended ranks compare with each reference, by perplexity and by the searched metric."""
    lines = [worse] if (worse := worse_than_none(comparison)) else []
    for measure in ("loss", *comparison.row(OURS).scores):
        name = "perplexity" if measure == "loss" else measure
        lines.append(f"{OURS} by {name}, paired differences on {len(comparison.seeds)} fresh seeds:\n")
        for method in comparison.references:
            paired = comparison.paired(method, measure)
            lines.append(
                f"* {_VERDICTS[paired.verdict]} {method}: {difference_text(paired)}{_cost_note(comparison, method)}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def worse_than_none(comparison: Comparison) -> str:
    """Returns the sentence to say where recovery with the recommended ranks is worse than none, else an empty text."""
    rows = {row.method: row for row in comparison.rows}
    if NONE not in rows or (ours := np.mean(rows[OURS].losses)) <= (none := rows[NONE].losses[0]):
        return ""
    return (
        f"Recovery made the model WORSE than no recovery: perplexity {math.exp(ours):.2f} with the recommended ranks, "
        f"{math.exp(none):.2f} without. Lower the learning rate, or train longer.\n"
    )


def _cost_note(comparison: Comparison, method: str) -> str:
    difference = comparison.cost_difference(method)
    return f", with {difference:+.1%} trainable parameters" if difference else ""


def difference_text(paired: PairedDifference) -> str:
    """Returns a paired difference of perplexity or another measure: ``-2.10% (95% interval -2.40% to -1.80%)``."""
    values = (paired.mean, *paired.interval)
    mean, low, high = (f"{math.expm1(x):+.2%}" if paired.measure == "loss" else f"{x:+.4f}" for x in values)
    return f"{mean} on every seed, no spread to judge by" if paired.alike else f"{mean} (95% interval {low} to {high})"


def write_comparison(comparison: Comparison) -> None:
    """Writes ``compare.md`` and ``compare.png`` into the comparison's folder."""
    text = f"{markdown_table(comparison_table(comparison))}\n\n{comparison_verdict(comparison)}\n"
    write_text(comparison.out / "compare.md", text)
    draw_comparison(comparison).savefig(comparison.out / "compare.png", dpi=120)
