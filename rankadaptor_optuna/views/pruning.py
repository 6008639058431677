"""Pruned checkpoints as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankadaptor_optuna.views.style import as_count, as_percent
from rankadaptor_optuna.views.tables import Table, text_table

if TYPE_CHECKING:
    from rankadaptor_optuna.jobs.results import PruneResult
    from rankadaptor_optuna.pruning.importing import Imported


def pruning_summary(result: PruneResult) -> str:
    """Returns a table of the layers, and the totals."""
    pruned, (before, after) = result.pruned, result.perplexities
    return (
        f"{text_table(pruning_table(result))}\n"
        f"Removed {as_percent(pruned.parameters_removed, 2)} of the blocks' parameters "
        f"({as_percent(result.ratio, 2)} asked), {as_percent(pruned.total_parameters_removed, 2)} of all: "
        f"{as_count(result.parameters_before)} -> {as_count(result.parameters_after)}.\n"
        f"Perplexity on held-out text: {before:,.2f} -> {after:,.2f} (not recovered).\n"
        f"Saved to {result.out} as {type(pruned.model).__name__}."
    )


def pruning_table(result: PruneResult) -> Table:
    """Returns a row per layer: the shares of its heads, channels, parameters and importance that pruning removed."""
    head = ["layer", "heads removed", "channels removed", "parameters removed", "importance removed"]
    table = [head]
    for layer in result.pruned.profile:
        shares = (layer.heads_removed, layer.channels_removed, layer.parameters_removed, layer.importance_removed)
        table.append([str(layer.layer), *(as_percent(share) for share in shares)])
    return table


def import_summary(file: Path, out: Path, imported: Imported) -> str:
    """Returns the size of an imported checkpoint, and whether its tokenizer was saved."""
    parameters = sum(parameter.numel() for parameter in imported.model.parameters())
    lines = [
        f"{file}: {len(imported.profile)} layers, {as_count(parameters)} parameters, "
        f"{as_percent(imported.parameters_removed, 2)} of the blocks' parameters pruned.",
        f"Saved to {out} as {type(imported.model).__name__}.",
    ]
    if not imported.has_tokenizer:
        lines.append("No tokenizer saved: the file's tokenizer is unreadable. Name one with --tokenizer.")
    return "\n".join(lines)
