"""Pruned models as transformers classes: layers of differing shape that save and load like any other model.

transformers copies this file into checkpoints, so that `from_pretrained` opens them with `trust_remote_code=True`
without rankadaptor_optuna; it must import nothing of the package. In the config, `layer_shapes` holds the widths of
each layer and `pruning` the record of the pruning; all other widths are the dense model's.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def _counterparts(dense_config: Any, dense_model: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """Makes the pruned counterparts of a model family's config and model classes."""

    class PrunedConfig(dense_config):  # type: ignore[misc]
        model_type = f"pruned_{dense_config.model_type}"
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
            """Makes the static cache take its sizes from the keys; the config holds the dense sizes."""

    stem = dense_model.__name__.removesuffix("ForCausalLM")
    for cls, name in ((PrunedConfig, f"Pruned{stem}Config"), (PrunedForCausalLM, f"Pruned{stem}ForCausalLM")):
        cls.__name__ = cls.__qualname__ = name
    PrunedConfig.__doc__ = f"{dense_config.__name__} with the shape of each layer and how it was pruned."
    PrunedForCausalLM.__doc__ = f"{dense_model.__name__} with layers of differing shape."
    PrunedConfig.register_for_auto_class()
    PrunedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    return PrunedConfig, PrunedForCausalLM


def _resize(layer: Any, shape: dict[str, int]) -> None:  # noqa: ANN401
    """Replaces the projections of a dense block by projections of the pruned shape."""
    query, key = (shape[name] * layer.self_attn.head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    channels, hidden = shape["intermediate_size"], layer.mlp.down_proj.out_features
    for name, n_out, n_in in (
        ("self_attn.q_proj", query, hidden),
        ("self_attn.k_proj", key, hidden),
        ("self_attn.v_proj", key, hidden),
        ("self_attn.o_proj", hidden, query),
        ("mlp.gate_proj", channels, hidden),
        ("mlp.up_proj", channels, hidden),
        ("mlp.down_proj", hidden, channels),
    ):
        old: Any = layer.get_submodule(name)
        new = nn.Linear(n_in, n_out, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        layer.set_submodule(name, new)


PrunedLlamaConfig, PrunedLlamaForCausalLM = _counterparts(LlamaConfig, LlamaForCausalLM)
PrunedMistralConfig, PrunedMistralForCausalLM = _counterparts(MistralConfig, MistralForCausalLM)
PrunedQwen2Config, PrunedQwen2ForCausalLM = _counterparts(Qwen2Config, Qwen2ForCausalLM)
PrunedQwen3Config, PrunedQwen3ForCausalLM = _counterparts(Qwen3Config, Qwen3ForCausalLM)
