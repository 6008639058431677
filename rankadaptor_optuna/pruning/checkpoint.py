"""Pruned models as transformers classes: layers of differing shape that save and load like any other model.

Importing this module registers them: `AutoModelForCausalLM.from_pretrained` then opens pruned checkpoints.
The files are safetensors and JSON. In the config, `layer_shapes` says how wide each layer is and `pruning`
how it came about; every other attribute keeps the value it had before pruning.
"""

from __future__ import annotations

import copy
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rankadaptor_optuna.pruning.structure import KINDS, PROJECTIONS, transformer_layers


@dataclass(frozen=True)
class LayerProfile:
    """What pruning took from one layer, as shares in [0, 1] of what the layer had.

    Attributes:
        layer: Index of the layer, from 0.
        heads_removed: Share of the key-value heads (their query heads went with them).
        channels_removed: Share of the MLP channels.
        parameters_removed: Share of the parameters: projections and norms.
        importance_removed: Share of the summed importance of all heads and channels.
    """

    layer: int
    heads_removed: float
    channels_removed: float
    parameters_removed: float
    importance_removed: float


_CLASSES: dict[str, tuple[Any, Any]] = {}  # by the dense model's type: config class, model class


def _register(dense_config: Any, dense_model: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """Make and register the pruned counterparts of a model family's config and model."""
    dense_type = dense_config.model_type

    class PrunedConfig(dense_config):  # type: ignore[misc]
        model_type = f"pruned_{dense_type}"
        layer_shapes: list[dict[str, int]] | None = None
        pruning: dict[str, Any] | None = None

    class PrunedForCausalLM(dense_model):  # type: ignore[misc]
        config_class = PrunedConfig

        def __init__(self, config: Any) -> None:  # noqa: ANN401
            super().__init__(config)
            shapes = config.layer_shapes or []
            if len(shapes) != config.num_hidden_layers:
                raise ValueError(
                    f"the config of a pruned model needs layer_shapes for {config.num_hidden_layers} layers, "
                    f"not {len(shapes)}; use rankadaptor_optuna.pruning.prune to make one"
                )
            for layer, shape in zip(self.model.layers, shapes, strict=True):
                _resize(layer, shape)
            self.post_init()  # initialises the new projections

        def _get_static_cache_init_shape(self) -> None:
            """Let the static cache take its sizes from the keys: those in the config are the dense ones."""

    stem = dense_model.__name__.removesuffix("ForCausalLM")
    for cls, name in ((PrunedConfig, f"Pruned{stem}Config"), (PrunedForCausalLM, f"Pruned{stem}ForCausalLM")):
        cls.__name__ = cls.__qualname__ = name
    PrunedConfig.__doc__ = f"{dense_config.__name__} with the shape of each layer and how it was pruned."
    PrunedForCausalLM.__doc__ = f"{dense_model.__name__} with layers of differing shape."
    AutoConfig.register(PrunedConfig.model_type, PrunedConfig)
    AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM)
    _CLASSES[dense_type] = (PrunedConfig, PrunedForCausalLM)
    return PrunedConfig, PrunedForCausalLM


def _resize(layer: nn.Module, shape: Mapping[str, int]) -> None:
    """Replace the projections of a dense block by ones of the pruned shape."""
    head_dim = int(layer.get_submodule("self_attn").head_dim)  # type: ignore[arg-type]
    query, key = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    channels = shape["intermediate_size"]
    width = {
        "self_attn.k_proj": key,
        "self_attn.v_proj": key,
        "self_attn.q_proj": query,
        "self_attn.o_proj": query,
    }
    for kind in KINDS:
        for name, dim in PROJECTIONS[kind].items():
            old: Any = layer.get_submodule(name)
            sizes = [old.out_features, old.in_features]
            sizes[dim] = width.get(name, channels)
            new = nn.Linear(sizes[1], sizes[0], old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
            layer.set_submodule(name, new)


PrunedLlamaConfig, PrunedLlamaForCausalLM = _register(LlamaConfig, LlamaForCausalLM)
PrunedMistralConfig, PrunedMistralForCausalLM = _register(MistralConfig, MistralForCausalLM)
PrunedQwen2Config, PrunedQwen2ForCausalLM = _register(Qwen2Config, Qwen2ForCausalLM)
PrunedQwen3Config, PrunedQwen3ForCausalLM = _register(Qwen3Config, Qwen3ForCausalLM)


def check_prunable(model: nn.Module) -> None:
    """Check that a model has a pruned counterpart to become.

    Args:
        model: The model to prune.

    Raises:
        ValueError: Its family is not known here, its modules are not LLaMA's, or it is pruned already.
    """
    transformer_layers(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if getattr(config, "layer_shapes", None) is not None:
        raise ValueError("the model is pruned already; prune the dense model with a larger ratio instead")
    if model_type not in _CLASSES:
        raise ValueError(f"cannot prune a model of type {model_type!r}; known types: {', '.join(_CLASSES)}")


def build_pruned(
    model: PreTrainedModel, cut: Mapping[str, torch.Tensor], pruning: Mapping[str, Any]
) -> PreTrainedModel:
    """Make the pruned counterpart of a dense model.

    Args:
        model: The dense model; it stays as it is and shares no memory with the new one.
        cut: The tensors that differ, by name.
        pruning: What the config shall say of the pruning, JSON-able.

    Returns:
        The pruned model, in evaluation mode.

    Raises:
        ValueError: See `check_prunable`.
    """
    check_prunable(model)
    config_class, model_class = _CLASSES[model.config.model_type]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in cut} | dict(cut)
    head_dim = int(model.get_submodule("model.layers.0.self_attn").head_dim)  # type: ignore[arg-type]
    shapes = [
        {
            "num_attention_heads": state[f"{prefix}.self_attn.q_proj.weight"].shape[0] // head_dim,
            "num_key_value_heads": state[f"{prefix}.self_attn.k_proj.weight"].shape[0] // head_dim,
            "intermediate_size": state[f"{prefix}.mlp.gate_proj.weight"].shape[0],
        }
        for prefix in (f"model.layers.{index}" for index in range(len(transformer_layers(model))))
    ]
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    config = config_class(**settings, layer_shapes=shapes, pruning=dict(pruning))
    config._attn_implementation = model.config._attn_implementation

    with torch.device("meta"):
        pruned: PreTrainedModel = model_class(config)
    pruned.load_state_dict(state, assign=True)
    # Its buffers are not in the state and are still on the meta device.
    rotary = copy.deepcopy(model.get_submodule("model.rotary_emb"))
    rotary.config = config
    pruned.set_submodule("model.rotary_emb", rotary)
    pruned.tie_weights()
    pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.train(False)
    return pruned


def save_pruned(model: PreTrainedModel, path: str | PathLike[str], tokenizer: Any = None) -> None:  # noqa: ANN401
    """Write a checkpoint: all of it or, on any failure, nothing.

    The files go to a temporary directory beside `path`, which is then renamed.

    Args:
        model: The model to save.
        path: Directory to create; its parents are created too.
        tokenizer: Saved along if given.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"cannot save to {path}: it exists and is not empty; remove it or choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        staging.mkdir()
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if path.exists():
            path.rmdir()
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_pruned(path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:  # noqa: ANN401
    """Open a pruned checkpoint.

    Args:
        path: Directory, or name on the Hugging Face Hub.
        **kwargs: For `AutoModelForCausalLM.from_pretrained`, such as `dtype` or `attn_implementation`.

    Returns:
        The pruned model, in evaluation mode.

    Raises:
        ValueError: There is an ordinary model instead.
        OSError: There is no model.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    if getattr(model.config, "layer_shapes", None) is None:
        raise ValueError(
            f"{path} holds an ordinary {type(model).__name__}, not a pruned model: "
            "open it with transformers, or prune it first"
        )
    return model


def profile_of(model: nn.Module) -> list[LayerProfile] | None:
    """Read what pruning took from each layer of a model.

    Args:
        model: Any model; one wrapped by PEFT too.

    Returns:
        One entry per layer, first to last, or None if the model was not pruned by this package.
    """
    pruning = getattr(getattr(model, "config", None), "pruning", None)
    return [LayerProfile(**entry) for entry in pruning["profile"]] if isinstance(pruning, Mapping) else None


def profile_to_json(profile: Sequence[LayerProfile]) -> list[dict[str, Any]]:
    """Turn a profile into what the config stores."""
    return [asdict(entry) for entry in profile]
