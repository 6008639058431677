"""The linear modules of a language model that LoRA can adapt, and the refusal of models that it cannot.

Needs no torch: linear modules are recognised by their features.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Kernels of state-space mixers read these weights themselves, so an adapter would have no effect (transformers,
# models/mamba/modeling_mamba.py: cuda_kernels_forward; models/mamba2: out_proj of mamba_split_conv1d_scan_combined).
_READ_BY_KERNELS = ("out_proj", "x_proj", "dt_proj")
_READ_BY_MODEL = ("correction_coefs",)  # Gemma3n clamps this weight in training (models/gemma3n/modeling_gemma3n.py)
# PEFT takes these names for fused experts (peft/utils/transformers_weight_conversion.py: _MOE_TARGET_MODULE_MAPPING)
_NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_POSITIONS = re.compile(r"\b(wpe|embed_positions|position_embeddings|positions_embed)\.weight$")  # learned; they end
_WRAPPERS = {"_orig_mod": "torch.compile", "module": "DataParallel and its like"}
_CROSS = re.compile(r"\.(cross_attn|crossattention|encoder_attn)\.")
_NUMBERED = re.compile(r"^(.+?)\.(\d+)\.")  # the outermost list on the way to a module


@dataclass(frozen=True)
class Linears:
    """The adaptable linear modules of a model.

    Attributes:
        path: Dotted name of the list of layers.
        features: (in, out) features of each adaptable linear module of a layer, by dotted name, in the model's order.
        notes: Sentences about modules that cannot be adapted.
    """

    path: str
    features: dict[str, tuple[int, int]]
    notes: tuple[str, ...]


def features(module: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Returns the in and out features of a linear module, quantised or not; None for any other module.

    The shape of a weight does not tell them: quantised weights are packed.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D":  # transformers' linear module of GPT-2
        return int(module.nx), int(module.nf)
    return None


def check_adaptable(model: Any) -> None:  # noqa: ANN401
    """Checks that a model can be adapted.

    Raises:
        ValueError: It is wrapped, has adapters already, is an encoder-decoder, or is quantised by a method without
            training.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    for inner, wrapper in _WRAPPERS.items():
        if [child for child, _ in model.named_children()] == [inner]:
            raise ValueError(f"{name} wraps the model ({wrapper}); pass the model itself, model.{inner}.")
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"{name} carries a PEFT adapter already; merge it (merge_and_unload), or pass the model without adapter."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; pass a decoder-only causal language model.")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", type(quantizer).__name__)
        raise ValueError(
            f"{name} is quantised by {getattr(method, 'value', method)}, through which no gradient flows; "
            "load it unquantised, or quantised by bitsandbytes."
        )


def check_language_model(model: Any) -> None:  # noqa: ANN401
    """Checks that a transformers model predicts tokens.

    Raises:
        ValueError: It has no language-model head.
    """
    try:
        headless = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None
    except (AttributeError, NotImplementedError):  # classes from elsewhere
        return
    if headless:
        raise ValueError(
            f"{type(model).__name__} has no language-model head, so it has no loss on text; "
            "load the model with AutoModelForCausalLM."
        )


def check_weights(model: Any) -> None:  # noqa: ANN401
    """Checks that the weights of a model are in memory, and can take part in training.

    Raises:
        ValueError: They are on the meta device, as those that are offloaded to disk, or made in inference mode.
    """
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        raise ValueError(
            f"{type(model).__name__} has weights that are offloaded to disk or not loaded; load it into main memory, "
            "without device_map and in bfloat16"
        )
    if any(weight.is_inference() for weight in weights):
        raise ValueError(
            f"{type(model).__name__} was made in torch.inference_mode, so it cannot train; load it outside"
        )


def n_positions(model: Any) -> int | None:  # noqa: ANN401
    """Returns the length of a model's table of learned positions; None for rotary and other positions."""
    has_table = any(_POSITIONS.search(name) for name, _ in model.named_parameters())
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) if has_table else None
    return limit or None


def adaptable_linears(model: Any) -> Linears:  # noqa: ANN401
    """Finds the list of layers of a model's text decoder, and the linear modules in it that LoRA can adapt.

    Raises:
        ValueError: The model cannot be adapted (``check_adaptable``), or has no list of layers with linear modules, or
            several.
    """
    check_adaptable(model)
    named = list(model.named_modules(remove_duplicate=False))
    found = {name: size for name, module in named if (size := features(module)) is not None}
    path, others = path_of_layers(model, found)
    uses = Counter(id(weight) for _, module in named if (weight := getattr(module, "weight", None)) is not None)
    modules = dict(named)
    inside = [name for name in found if name.startswith(f"{path}.")]
    stacked = _stacked(named, path)
    has_experts = any("expert" in kind.lower() for kind in stacked.values())
    skipped: dict[str, list[str]] = {}
    adaptable = {}
    for name in inside:
        module, parent, last = modules[name], modules[name.rpartition(".")[0]], name.rpartition(".")[2]
        if uses[id(getattr(module, "weight", None))] > 1:
            reason = "shared by several layers"
        elif last in _READ_BY_KERNELS and hasattr(parent, "A_log") and hasattr(parent, "D"):
            reason = "bypassed by the kernels of state-space mixers"
        elif _CROSS.search(name):
            reason = "attends to an encoder, which text alone does not run"
        elif last in _READ_BY_MODEL:
            reason = "its weight is read without the module"
        elif has_experts and last in _NAMES_OF_EXPERTS:
            reason = "named like the experts by PEFT"
        elif "Router" in type(module).__name__:
            reason = "a router, more than linear"
        else:
            adaptable[name] = found[name]
            continue
        skipped.setdefault(reason, []).append(_inside(name, path))
    notes = [f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in skipped.items()]
    if stacked:
        notes.append(f"{', '.join(stacked)} ({'fused experts' if has_experts else 'stacked'}, no linear modules)")
    if others:
        notes.append(f"{', '.join(others)} (not part of the text decoder {path})")
    if not adaptable:
        raise ValueError(f"{type(model).__name__} has no linear modules to adapt below '{path}.<i>.': {notes}.")
    return Linears(path, adaptable, (f"no adapters in: {'; '.join(notes)}",) if notes else ())


def _inside(name: str, path: str) -> str:
    """Returns the name within a layer."""
    return name[len(path) + 1 :].partition(".")[2]


def _stacked(named: Iterable[tuple[str, Any]], path: str) -> dict[str, str]:
    """Returns the names within a layer of parameters that stack several matrices, with the module that has them."""
    names: dict[str, str] = {}
    for name, module in named:
        if name.startswith(f"{path}.") and not hasattr(module, "kernel_size"):
            for parameter, value in module.named_parameters(recurse=False):
                if value.ndim == 3 and value.shape[0] > 1 and value.shape[1] > 1:
                    names[f"{_inside(name, path)}.{parameter}"] = f"{name} {type(module).__name__}"
    return names


def path_of_layers(model: Any, linears: Iterable[str]) -> tuple[str, list[str]]:  # noqa: ANN401
    """Returns the dotted name of the text decoder's list of layers, and those of other lists with linear modules."""
    lists: dict[str, set[int]] = {}
    for name in linears:
        if match := _NUMBERED.match(name):
            lists.setdefault(match[1], set()).add(int(match[2]))
    if not lists:
        raise ValueError(f"{type(model).__name__} has no linear modules below 'layers.<i>.'; nothing to adapt.")
    decoder = _decoder_name(model)
    found = [path for path in lists if not decoder or f"{path}.".startswith(f"{decoder}.")] or list(lists)
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    depth = getattr(text_config, "num_hidden_layers", None)
    for fits in (
        lambda path: len(model.get_submodule(path)) == depth,
        lambda path: path.rpartition(".")[2] == "layers",
    ):
        found = [path for path in found if fits(path)] or found if len(found) > 1 else found
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of layers: {', '.join(found)}; a rank space needs a "
            "decoder with one."
        )
    return found[0], [path for path in lists if path != found[0]]


def _decoder_name(model: Any) -> str:  # noqa: ANN401
    """Returns the dotted name of the text decoder, as far as transformers knows it; else empty."""
    if not hasattr(model, "get_decoder"):
        return ""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):  # classes from elsewhere
        return ""
    return next((name for name, module in model.named_modules() if module is decoder), "")


def designed_model(model: Any) -> Any:  # noqa: ANN401
    """Builds a model's architecture from its configuration, without weights: with the shapes before any pruning.

    Returns:
        The model on the meta device; None for the classes of pruned models, whose layers were alike, and where the
        class cannot be built from its configuration.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "layer_shapes", None) is not None:
        return None
    import torch

    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(config))
    except Exception:  # classes of any origin, and any constructor
        return None
