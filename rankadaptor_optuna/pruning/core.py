"""`prune`: cut a dense model down to size by a named method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rankadaptor_optuna.pruning.checkpoint import (
    LayerProfile,
    build_pruned,
    check_prunable,
    profile_to_json,
    save_pruned,
)
from rankadaptor_optuna.pruning.selection import Costs, default_kept, select_kept
from rankadaptor_optuna.pruning.structure import (
    KINDS,
    Kind,
    keep_units,
    layer_shape,
    transformer_layers,
    unit_size,
)
from rankadaptor_optuna.pruning.taylor import Importance, Progress, draw_samples, taylor_importance

# How each method scores the units; the ranking, the cutting and the checkpoint are the same for all.
METHODS = {"llm-pruner": taylor_importance}


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model and what pruning took from it.

    Attributes:
        model: The pruned model, an ordinary transformers model with layers of differing shape.
        profile: What each layer lost, first to last.
        parameters_removed: Share of the parameters of all transformer blocks that is gone.
        total_parameters_removed: Share of all parameters that is gone; tied embeddings count once.
    """

    model: PreTrainedModel
    profile: list[LayerProfile]
    parameters_removed: float
    total_parameters_removed: float

    def save(self, path: str | PathLike[str], tokenizer: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint of safetensors and JSON: all of it or, on any failure, nothing.

        Args:
            path: Directory to create.
            tokenizer: Saved along if given.

        Raises:
            ValueError: `path` exists and is not an empty directory.
        """
        save_pruned(self.model, path, tokenizer)


@torch.inference_mode(False)
def prune(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    *,
    method: str = "llm-pruner",
    ratio: float = 0.25,
    calibration: Sequence[str] | None = None,
    keep_first: int | None = None,
    keep_last: int | None = None,
    multiple_of: int = 32,
    n_samples: int = 10,
    sample_length: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> PrunedModel:
    """Remove the least important heads and MLP channels of a model.

    `"llm-pruner"` is LLM-Pruner's block-wise pruning with element-wise first-order Taylor importance
    (`taylor_importance`, equation 2 of the RankAdaptor paper). Its global ranking prunes layers unevenly.

    Args:
        model: A dense Llama, Mistral, Qwen2 or Qwen3 causal language model. It stays as it is: the result is
            a new model that shares no memory with it.
        tokenizer: The model's tokenizer.
        method: How units are scored; `"llm-pruner"`.
        ratio: Share of the parameters of all transformer blocks (not the embeddings) to remove, in (0, 1).
            Layers that stay whole count too, so the others lose more. Met as closely as the units allow.
        calibration: Texts to measure importance on; required.
        keep_first: How many layers at the start stay whole. Default: 4 of 32, in proportion, at least 1.
        keep_last: How many layers at the end stay whole. Default: 2 of 32, in proportion, at least 1.
        multiple_of: MLP widths stay multiples of this, which hardware likes. A narrower MLP uses the largest
            proper divisor of its width.
        n_samples: Windows of text to calibrate on.
        sample_length: Tokens per window.
        seed: Decides which windows; same seed, same result.
        progress: Called with (samples done, samples in all) during calibration.

    Returns:
        The pruned model, with what it lost.

    Raises:
        ValueError: An argument is out of range, the model cannot be pruned, or the ratio cannot be reached.
    """
    if method not in METHODS:
        raise ValueError(f"unknown pruning method {method!r}; known methods: {', '.join(METHODS)}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie in (0, 1), not {ratio}: it is the share of block parameters to remove")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, not {multiple_of}")
    if calibration is None:
        raise ValueError(
            f"method {method!r} needs calibration: a list of texts such as the model will see, "
            f"{n_samples} x {sample_length} tokens or more in all"
        )
    check_prunable(model)
    layers = transformer_layers(model)
    window = _window(len(layers), keep_first, keep_last)
    samples = draw_samples(tokenizer, calibration, n_samples=n_samples, sample_length=sample_length, seed=seed)
    importance = METHODS[method](model, samples, window, progress=progress)
    costs = Costs(
        head=unit_size(layers[0], "heads"),
        channel=unit_size(layers[0], "channels"),
        total=sum(_size(layer) for layer in layers),
    )
    heads, channels = select_kept(
        importance["heads"], importance["channels"], ratio=ratio, costs=costs, multiple_of=multiple_of
    )
    kept: dict[Kind, dict[int, list[int]]] = {"heads": heads, "channels": channels}
    profile = [_profile(layer, index, kept, importance, costs) for index, layer in enumerate(layers)]
    settings = {
        "keep_first": window[0],
        "keep_last": len(layers) - 1 - window[-1],
        "multiple_of": multiple_of,
        "n_samples": n_samples,
        "sample_length": sample_length,
        "seed": seed,
    }
    cut = {
        f"model.layers.{index}.{name}": tensor
        for kind in KINDS
        for index, units in kept[kind].items()
        for name, tensor in keep_units(layers[index], kind, units).items()
    }
    pruned = build_pruned(
        model,
        cut,
        {"method": method, "ratio": ratio, "settings": settings, "profile": profile_to_json(profile)},
    )
    blocks = sum(_size(layer) for layer in transformer_layers(pruned))
    return PrunedModel(pruned, profile, 1 - blocks / costs.total, 1 - _size(pruned) / _size(model))


def _window(n_layers: int, keep_first: int | None, keep_last: int | None) -> range:
    """The layers that may be pruned."""
    defaults = default_kept(n_layers)
    first = defaults[0] if keep_first is None else keep_first
    last = defaults[1] if keep_last is None else keep_last
    if first < 0 or last < 0:
        raise ValueError(f"keep_first and keep_last must not be negative, not {first} and {last}")
    if first + last >= n_layers:
        raise ValueError(
            f"nothing to prune: of the model's {n_layers} layers the first {first} and the last {last} "
            "are kept; lower keep_first or keep_last, or take a deeper model"
        )
    return range(first, n_layers - last)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _profile(
    layer: nn.Module,
    index: int,
    kept: dict[Kind, dict[int, list[int]]],
    importance: Importance,
    costs: Costs,
) -> LayerProfile:
    if index not in kept["heads"]:
        return LayerProfile(index, 0.0, 0.0, 0.0, 0.0)
    shape = layer_shape(layer)
    heads, channels = shape.heads - len(kept["heads"][index]), shape.channels - len(kept["channels"][index])
    before = sum(float(importance[kind][index].double().sum()) for kind in KINDS)
    after = sum(float(importance[kind][index][kept[kind][index]].double().sum()) for kind in KINDS)
    return LayerProfile(
        layer=index,
        heads_removed=heads / shape.heads,
        channels_removed=channels / shape.channels,
        parameters_removed=(heads * costs.head + channels * costs.channel) / _size(layer),
        importance_removed=1 - after / before if before > 0 else 0.0,
    )
