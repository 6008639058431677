"""Prune a model without a study, and write the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankadaptor_optuna.checks.folders import check_writable
from rankadaptor_optuna.jobs.output import progress_bar
from rankadaptor_optuna.jobs.results import PruneResult
from rankadaptor_optuna.llm.texts import load_texts, read_texts
from rankadaptor_optuna.recovery.data import token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses

# Text of the perplexities, set by hand: some seconds on a CPU for a model of 1 billion parameters.
_BLOCKS, _BLOCK_LENGTH = 8, 128
_LARGEST_LOSS = 700.0  # exp overflows beyond 709


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
    from rankadaptor_optuna.pruning import PruningConfig, llm_pruner_preset, prune
    from rankadaptor_optuna.pruning.checkpoint import check_prunable, check_save_path
    from rankadaptor_optuna.recovery.models import load_model, n_parameters

    check_writable(out)
    check_save_path(out)
    options = dict(options or {})
    texts = read_texts(options.pop("calibration", None))
    config = PruningConfig().changed(**options)  # refuses options before a model is loaded
    dense, tokenizer = load_model(None if model == "embedded" else model, dtype)
    check_prunable(dense, config.method)
    if preset:
        published = llm_pruner_preset(dense.config.get_text_config().num_hidden_layers)
        config = PruningConfig().changed(**published | options)
    before, device, parameters = _perplexity(dense, tokenizer), dense.device, n_parameters(dense)
    with progress_bar("prune") as progress:
        pruned = prune(dense, tokenizer, config, calibration=texts, progress=progress)
    pruned.save(out, tokenizer)
    ratio = pruned.model.config.pruning["ratio"]
    del dense  # its device takes the pruned model
    perplexities = before, _perplexity(pruned.model.to(device), tokenizer)
    return PruneResult(pruned, ratio, parameters, n_parameters(pruned.model), perplexities, out)


def _perplexity(model: Any, tokenizer: Any) -> float:  # noqa: ANN401
    """Returns the perplexity on the first blocks of the embedded text's validation part."""
    from rankadaptor_optuna.pruning.calibration import check_vocabulary

    texts = load_texts().validation
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _BLOCK_LENGTH
    blocks = token_blocks(tokenizer, texts, min(_BLOCK_LENGTH, longest), _BLOCKS)
    check_vocabulary(blocks, model.get_input_embeddings().weight.shape[0])
    return math.exp(min(float(block_losses(model, blocks).mean()), _LARGEST_LOSS))
