"""`prune`: cut a dense model down to size by a named method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rankadaptor_optuna.llm.adaptable import n_positions
from rankadaptor_optuna.llm.texts import read_texts
from rankadaptor_optuna.pruning.blocks import block_list, without_blocks
from rankadaptor_optuna.pruning.calibration import draw_samples
from rankadaptor_optuna.pruning.checkpoint import (
    LayerProfile,
    build_pruned,
    check_prunable,
    profile_to_json,
    save_pruned,
)
from rankadaptor_optuna.pruning.config import PruningConfig
from rankadaptor_optuna.pruning.gradients import Progress
from rankadaptor_optuna.pruning.methods import PLANNERS, size
from rankadaptor_optuna.pruning.structure import has_units


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model and its pruning profile.

    Attributes:
        model: The pruned model, on the CPU: an ordinary transformers model if all its layers have one shape, else a
            model whose layers differ in shape.
        profile: What each layer of the dense model lost, first to last.
        parameters_removed: Share of the parameters of all transformer blocks that was removed.
        total_parameters_removed: Share of all parameters that was removed; tied embeddings count once.
    """

    model: PreTrainedModel
    profile: list[LayerProfile]
    parameters_removed: float
    total_parameters_removed: float

    def save(self, path: str | PathLike[str], tokenizer: Any = None) -> None:  # noqa: ANN401
        """Writes a checkpoint of safetensors and JSON: all of it or, on any failure, nothing.

        Args:
            path: Directory to create.
            tokenizer: Tokenizer to save with the model. Default: none.

        Raises:
            ValueError: `path` exists and is not an empty directory.
        """
        save_pruned(self.model, path, tokenizer)


@torch.inference_mode(False)
def prune(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    config: PruningConfig | None = None,
    *,
    calibration: Sequence[str] | str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **changes: Any,  # noqa: ANN401
) -> PrunedModel:
    """Removes the least important parts of a model: `prune(model, tokenizer, method="slimgpt", ratio=0.2)`.

    * `"llm-pruner"` (arXiv 2305.11627): heads and MLP channels by Taylor importance (`unit_importance`, equation 2 of
      the RankAdaptor paper); its global ranking prunes layers unevenly. With `structure="hidden"`, channels of the
      hidden state through the whole model.
    * `"shortened"` (Shortened LLaMA, arXiv 2402.02834): whole blocks (`block_importance`).
    * `"slimgpt"` (arXiv 2412.18110): heads and MLP channels layer by layer, by the output error that remains after the
      other weights have been corrected, more in later layers (`slimgpt`).

    The model runs block by block on its device, which holds no more than the model and one block's gradients or
    Hessians. The hidden states and the pruned model are held in main memory.

    Args:
        model: A dense Llama, Mistral, Qwen2 or Qwen3 causal language model; for `"shortened"` any decoder with a list
            of blocks. It is not changed: the result is a new model that shares no memory with it.
        tokenizer: The model's tokenizer.
        config: Options. Default: `PruningConfig()`.
        calibration: Calibration text: a list of texts, or a file or Hub data set (`read_texts`). Default: the embedded
            text.
        progress: Called with (blocks done, blocks in all) during calibration.
        **changes: Options of `PruningConfig` by name, which replace those of `config`.

    Returns:
        The pruned model and its pruning profile. The ratio is met as closely as the units allow.

    Raises:
        ValueError: An option is unknown or out of range, the model cannot be pruned, or the ratio cannot be reached.
    """
    config = (config or PruningConfig()).changed(**changes)
    check_prunable(model, config.method)
    settings = config.resolved(len(block_list(model)[1]))
    if settings["sample_length"] > (limit := n_positions(model) or math.inf):
        raise ValueError(
            f"sample_length={settings['sample_length']} exceeds the {limit} positions of the model; lower it"
        )
    samples = draw_samples(
        tokenizer,
        read_texts(calibration),
        n_samples=settings["n_samples"],
        sample_length=settings["sample_length"],
        seed=settings["seed"],
    )
    plan = PLANNERS[config.method](model, samples, settings, progress)
    record = {
        "method": config.method,
        "ratio": settings.pop("ratio"),
        "settings": settings,
        "profile": profile_to_json(plan.profile),
    }
    if has_units(model):
        pruned = build_pruned(model, plan.cut, record, plan.layers)
    else:
        pruned = without_blocks(model, plan.layers, record, samples[0])
    removed = 1 - _blocks_size(pruned) / _blocks_size(model)
    return PrunedModel(pruned, plan.profile, removed, 1 - size(pruned) / size(model))


def _blocks_size(model: PreTrainedModel) -> int:
    return size(nn.ModuleList(block_list(model)[1]))
