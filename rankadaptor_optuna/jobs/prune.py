"""Prune a model without a study, and write the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankadaptor_optuna.jobs.output import progress_bar
from rankadaptor_optuna.jobs.results import PruneResult


def prune_checkpoint(
    model: str, out: Path, options: Mapping[str, Any] | None = None, *, preset: bool = False, dtype: str = "auto"
) -> PruneResult:
    """Prunes a model and writes it as safetensors and JSON.

    Args:
        model: Model folder or Hub name, or ``"embedded"``: SmolLM2-135M-Instruct.
        out: Folder to create.
        options: Arguments of ``pruning.prune``.
        preset: Whether ``options`` change LLM-Pruner's published settings instead of the method's defaults.
        dtype: Torch dtype by name; ``"auto"`` is the checkpoint's.

    Raises:
        ValueError: The model cannot be loaded, or not pruned with these options, or ``out`` is not empty.
    """
    from rankadaptor_optuna.pruning import llm_pruner_preset, prune
    from rankadaptor_optuna.pruning.checkpoint import check_prunable, check_save_path
    from rankadaptor_optuna.recovery.models import load_model, n_parameters

    check_save_path(out)
    dense, tokenizer = load_model(None if model == "embedded" else model, dtype)
    check_prunable(dense)
    settings = (llm_pruner_preset(dense.config.num_hidden_layers) if preset else {}) | dict(options or {})
    with progress_bar("prune") as progress:
        pruned = prune(dense, tokenizer, progress=progress, **settings)
    pruned.save(out, tokenizer)
    ratio = pruned.model.config.pruning["ratio"]
    return PruneResult(pruned, ratio, n_parameters(dense), n_parameters(pruned.model), out)
