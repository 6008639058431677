"""Checkpoints of pruned models: safetensors and JSON that open like any other model.

Importing this module registers the pruned classes, so that `AutoModelForCausalLM.from_pretrained` opens the
checkpoints. `import rankadaptor_optuna` imports it as soon as transformers' Auto classes are used (`auto_classes`).
"""

from __future__ import annotations

import copy
import glob
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rankadaptor_optuna.llm.adaptable import check_adaptable, check_language_model, check_weights
from rankadaptor_optuna.pruning import modeling
from rankadaptor_optuna.pruning.blocks import block_list, check_unquantised
from rankadaptor_optuna.pruning.structure import transformer_layers


@dataclass(frozen=True)
class LayerProfile:
    """Shares in [0, 1] of a dense model's layer that pruning removed.

    Attributes:
        layer: Index of the layer in the dense model, from 0.
        heads_removed: Share of the key-value heads, with their query heads.
        channels_removed: Share of the MLP channels.
        parameters_removed: Share of the parameters, projections and norms.
        importance_removed: Share of the summed importance of all units.
    """

    layer: int
    heads_removed: float
    channels_removed: float
    parameters_removed: float
    importance_removed: float


_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (modeling.PrunedLlamaConfig, modeling.PrunedLlamaForCausalLM),
    "mistral": (modeling.PrunedMistralConfig, modeling.PrunedMistralForCausalLM),
    "qwen2": (modeling.PrunedQwen2Config, modeling.PrunedQwen2ForCausalLM),
    "qwen3": (modeling.PrunedQwen3Config, modeling.PrunedQwen3ForCausalLM),
}
for _config, _model in _CLASSES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)


def check_prunable(model: nn.Module, method: str = "llm-pruner") -> None:
    """Checks that a model can be pruned.

    Args:
        model: The model to prune.
        method: The pruning method; `"shortened"` takes any decoder with a list of blocks.

    Raises:
        ValueError: The method does not know the model's family, the model has no language-model head, it is offloaded
            to disk, or it is pruned already.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if getattr(config, "pruning", None) is not None:
        raise ValueError("the model is pruned already; prune the dense model with a larger ratio instead")
    check_adaptable(model)
    check_unquantised(model)
    if method == "shortened":
        block_list(model)
    else:
        transformer_layers(model)
        if model_type not in _CLASSES:
            raise ValueError(
                f"method {method!r} cannot prune a model of type {model_type!r}; known types: {', '.join(_CLASSES)}; "
                "method 'shortened' removes whole blocks from others"
            )
    check_language_model(model)
    check_weights(model)


def build_pruned(
    model: PreTrainedModel,
    cut: Mapping[str, torch.Tensor],
    pruning: Mapping[str, Any],
    layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Makes the pruned counterpart of a dense model, on the CPU.

    If all its layers have one shape, it is an ordinary model that any tool opens, unless the family's config refuses
    the shape (LLaMA's requires a hidden size that is a multiple of the number of heads). Else it is of the pruned
    class. It is built in main memory, as the dense model may fill an accelerator.

    Args:
        model: The dense model; it is not changed and shares no memory with the new model.
        cut: The tensors that differ, by their name in the dense model; on the CPU.
        pruning: Record of the pruning for the config, JSON-able.
        layers: The blocks to keep, in rising order. Default: all.

    Returns:
        The pruned model, in evaluation mode.

    Raises:
        ValueError: See `check_prunable`.
    """
    check_prunable(model)
    kept = range(len(transformer_layers(model))) if layers is None else layers
    renamed = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        block = ".".join(name.split(".")[:3]) + "."
        if not name.startswith("model.layers.") or block in renamed:
            new = cut.get(name, tensor)
            state[name.replace(block, renamed.get(block, block), 1)] = (
                tensor.detach().to("cpu", copy=True) if new is tensor else new
            )
    config = model.config
    if getattr(config, "layer_types", None) is not None:
        config = copy.deepcopy(config)
        config.layer_types = [config.layer_types[index] for index in kept]
    pruned = model_from_state(config, state, pruning)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned


def model_from_state(config: Any, state: Mapping[str, torch.Tensor], pruning: Mapping[str, Any]) -> PreTrainedModel:  # noqa: ANN401
    """Makes a model from the weights of a pruned model.

    Args:
        config: The dense model's config, of a known family; its `layer_types`, if any, are those of the blocks kept.
        state: The pruned model's tensors, on the CPU; the model uses them without a copy.
        pruning: Record of the pruning for the config, JSON-able.

    Returns:
        The model, in evaluation mode; `build_pruned` says of which class.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes: list[dict[str, int]] = []
    while (prefix := f"model.layers.{len(shapes)}") + ".mlp.gate_proj.weight" in state:
        names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        query, key, gate = (state[f"{prefix}.{name}.weight"].shape[0] for name in names)
        shapes.append(
            {
                "num_attention_heads": query // head_dim,
                "num_key_value_heads": key // head_dim,
                "intermediate_size": gate,
            }
        )
    settings = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    settings |= {
        "num_hidden_layers": len(shapes),
        "hidden_size": state["model.embed_tokens.weight"].shape[1],
        "head_dim": head_dim,
        "pruning": dict(pruning),
    }
    config_class, model_class = _CLASSES[config.model_type]
    new = config_class(**settings, layer_shapes=shapes)
    if all(shape == shapes[0] for shape in shapes):
        try:
            new = type(config)(**(settings | shapes[0]))
            model_class = model_class.__base__
        except StrictDataclassError:
            pass
    new._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        model: PreTrainedModel = model_class(new)
    model.load_state_dict(dict(state), assign=True)
    # the rotary embedding's buffers are not in the state and are still on the meta device
    rotary: Any = model.get_submodule("model.rotary_emb")
    model.set_submodule("model.rotary_emb", type(rotary)(new))
    model.tie_weights()
    model.train(False)
    return model


def check_save_path(path: Path) -> None:
    """Checks that a checkpoint can be written to a path.

    Raises:
        ValueError: The path exists and is not an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"cannot save to {path}: it exists and is not empty; remove it or choose another path")


def save_pruned(model: PreTrainedModel, path: str | PathLike[str], tokenizer: Any = None) -> None:  # noqa: ANN401
    """Writes a checkpoint: all of it or, on any failure, nothing.

    Writes to a temporary directory beside `path` and renames it.

    Args:
        model: The model to save.
        path: Directory to create; its parents are created too.
        tokenizer: Tokenizer to save with the model. Default: none.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    check_save_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        staging.mkdir()
        _save_model(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if path.exists():
            path.rmdir()
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def unfinished(path: Path) -> list[Path]:
    """Returns folders that ``save_pruned`` has begun for a path; a killed process leaves its folder behind."""
    return [*path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}")]


def remove_unfinished(path: Path) -> None:
    """Removes what killed processes have left; no other process may be writing to the path."""
    for folder in unfinished(path):
        shutil.rmtree(folder, ignore_errors=True)


def _save_model(model: PreTrainedModel, path: Path) -> None:
    """Writes a model; its generation configuration as it was loaded.

    transformers loads a temperature without sampling, which Llama 2's checkpoints have, and refuses to save it.
    """
    generation: Any = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError:
        model.generation_config = type(generation)()
        try:
            model.save_pretrained(path)
        finally:
            model.generation_config = generation
        generation.to_json_file(path / "generation_config.json")
        return
    model.save_pretrained(path)


def load_pruned(path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:  # noqa: ANN401
    """Opens a pruned checkpoint.

    Args:
        path: Directory, or name on the Hugging Face Hub.
        **kwargs: Arguments of `AutoModelForCausalLM.from_pretrained`, such as `dtype` or `attn_implementation`.

    Returns:
        The pruned model, in evaluation mode.

    Raises:
        ValueError: The checkpoint holds an ordinary model.
        OSError: There is no model.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    if profile_of(model) is None:
        raise ValueError(
            f"{path} holds an ordinary {type(model).__name__}, not a pruned model: "
            "open it with transformers, or prune it first"
        )
    return model


def profile_of(model: nn.Module) -> list[LayerProfile] | None:
    """Reads the pruning profile from a model's config.

    Args:
        model: Any model, also with a PEFT adapter.

    Returns:
        One entry per layer of the dense model, first to last, or None if this package did not prune the model.
    """
    pruning = getattr(getattr(model, "config", None), "pruning", None)
    return [LayerProfile(**entry) for entry in pruning["profile"]] if isinstance(pruning, Mapping) else None


def profile_to_json(profile: Sequence[LayerProfile]) -> list[dict[str, Any]]:
    """Returns a profile in the form that the config stores."""
    return [asdict(entry) for entry in profile]
