"""Converts LLM-Pruner's pickled checkpoints to safetensors without running any code from them.

LLM-Pruner saves whole pickled objects: ``torch.save({"model": ..., "tokenizer": ...}, file)``. An ordinary unpickler
runs any function that it names. Here torch's restricted unpickler (``weights_only=True``) reads it: it has a
fixed list of harmless constructors for tensors and containers and refuses every other name. Names from the packages of
models and tokenizers are replaced by stubs, which store their arguments and do nothing; no module is imported and no
function is called because a file names it. Any other name is an error before the first object is created.
"""

from __future__ import annotations

import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rankadaptor_optuna.checks.folders import check_writable
from rankadaptor_optuna.pruning.checkpoint import (
    LayerProfile,
    check_save_path,
    model_from_state,
    profile_to_json,
    save_pruned,
)
from rankadaptor_optuna.pruning.structure import PROJECTION_NAMES

_PACKAGES = ("transformers", "LLMPruner", "tokenizers", "sentencepiece", "accelerate", "torch.nn", "collections")
_NAMES = ("functools.partial", "builtins.object")
_CONFIGS: dict[str, Any] = {
    f"{config.__name__.removesuffix('Config')}ForCausalLM": config
    for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class _Stub:
    """Stands for an object of a class that a file names: stores its arguments and its state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stub:  # noqa: ANN401
        stub = object.__new__(cls)
        stub.__dict__["_arguments"] = args
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Does nothing: ``__new__`` has stored the arguments."""

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        self.__dict__["_state"] = state
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})


@dataclass(frozen=True)
class Imported:
    """A converted checkpoint.

    Attributes:
        model: The pruned model.
        profile: What each layer lost, relative to the dense shapes in the file's config; the removed importance is
            unknown and set to 0.
        parameters_removed: Share of the parameters of all transformer blocks that was removed.
        has_tokenizer: Whether a tokenizer was saved with the model.
    """

    model: PreTrainedModel
    profile: list[LayerProfile]
    parameters_removed: float
    has_tokenizer: bool


def import_checkpoint(
    file: str | PathLike[str],
    out: str | PathLike[str],
    tokenizer: str | PathLike[str] | None = None,
    *,
    allow_pickle: bool = False,
) -> Imported:
    """Converts a checkpoint of LLM-Pruner to safetensors and JSON.

    Args:
        file: LLM-Pruner's ``pytorch_model.bin``, in the zip format of torch.save since torch 1.6.
        out: Folder to create.
        tokenizer: Folder or Hub name of the tokenizer. Default: the file's tokenizer, if it can be read: a fast one
            holds its JSON, a slow LLaMA one its sentencepiece model.
        allow_pickle: Must be True to read a pickle, as in ``numpy.load``.

    Raises:
        ValueError: Pickles are not allowed, there is no such file, it names anything but models and tokenizers, or it
            holds no Llama, Mistral, Qwen2 or Qwen3 model.
    """
    file, out = Path(file), Path(out)
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if not allow_pickle:
        raise ValueError(
            f"{file} is a pickle. To read it by torch's restricted unpickler, which runs no code from it, "
            "set allow_pickle=True (--allow-pickle)"
        )
    check_writable(out)
    check_save_path(out)
    content = _unpickle(file)
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, _Stub):
        raise ValueError(f"{file} is not a checkpoint of LLM-Pruner: it holds no model object under 'model'")
    state = dict(_tensors(model))
    config = _config(model, state, file)
    profile, removed = _profile(config, state)
    record = {"method": "llm-pruner (imported)", "ratio": removed, "profile": profile_to_json(profile)}
    try:
        pruned = model_from_state(config, state, record)
    except RuntimeError as error:  # of load_state_dict
        raise ValueError(f"{file} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
    with tempfile.TemporaryDirectory() as scratch:
        found = _named_tokenizer(tokenizer) if tokenizer else _tokenizer(content.get("tokenizer"), Path(scratch))
        save_pruned(pruned, out, found)
    return Imported(pruned, profile, removed, found is not None)


def _unpickle(file: Path) -> Any:  # noqa: ANN401
    """Returns the file's content, with stubs for objects of the packages in ``_PACKAGES``."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not in torch.save's zip format; give the pytorch_model.bin of LLM-Pruner")
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        if refused := [name for name in names if not _harmless(name)]:
            raise ValueError(
                f"it names {', '.join(refused)}, which does not belong in a model's checkpoint and may run code on "
                "your machine. No code was run; do not load the file in any other way"
            )
        stubs: list[Any] = [(type(name.rpartition(".")[2], (_Stub,), {}), name) for name in names]
        with torch.serialization.safe_globals(stubs):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0]
        raise ValueError(f"{file} cannot be read: {reason}") from error
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        raise ValueError(f"{file} cannot be read: {(str(error).splitlines() or [repr(error)])[0]}") from error


def _harmless(name: str) -> bool:
    return name in _NAMES or any(name.startswith(f"{package}.") for package in _PACKAGES)


def _tensors(stub: _Stub, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters of a pickled module and of all its submodules, by name."""
    for name, tensor in _dict(stub, "_parameters").items():
        if isinstance(tensor, torch.Tensor):
            yield f"{prefix}{name}", tensor.detach()
    for name, module in _dict(stub, "_modules").items():
        if isinstance(module, _Stub):
            yield from _tensors(module, f"{prefix}{name}.")


def _dict(stub: _Stub, name: str) -> Mapping[str, Any]:
    found = stub.__dict__.get(name)
    return found if isinstance(found, Mapping) else {}


def _config(model: _Stub, state: Mapping[str, torch.Tensor], file: Path) -> Any:  # noqa: ANN401
    """Returns the dense model's config from the file, with the names of current transformers."""
    stub, family = getattr(model, "config", None), type(model).__name__
    plain = {key: value for key, value in getattr(stub, "__dict__", {}).items() if _is_plain(value)}
    config = _CONFIGS.get(family)
    if config is None or (type(stub).__name__, plain.get("model_type", config.model_type)) != (
        config.__name__,
        config.model_type,
    ):
        raise ValueError(
            f"{file} holds a {family} with a {type(stub).__name__}; import-checkpoint reads {', '.join(_CONFIGS)}, "
            "each with the configuration of its family"
        )
    known = config().to_dict().keys() | {"rope_theta", "rope_scaling"}
    settings = {key: plain[key] for key in known & plain.keys() if key not in ("model_type", "architectures")}
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
    missing = [key for key in needed if key not in settings]
    missing += [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name not in state]
    for index in range(settings.get("num_hidden_layers") or 0):
        missing += [n for name in PROJECTION_NAMES if (n := f"model.layers.{index}.{name}.weight") not in state]
    if missing:
        raise ValueError(f"{file} holds no {family}: it lacks {', '.join(missing[:3])}")
    settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    _check_widths(settings, state, file)
    return config(**settings)


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, (Mapping, list, tuple)):
        return all(_is_plain(v) for v in (value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, (bool, int, float, str))


def _check_widths(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor], file: Path) -> None:
    head_dim, hidden = settings["head_dim"], state["model.embed_tokens.weight"].shape[1]
    for index in range(settings["num_hidden_layers"]):
        shape = {name: tuple(state[f"model.layers.{index}.{name}.weight"].shape) for name in PROJECTION_NAMES}
        query, key = shape["self_attn.q_proj"][0], shape["self_attn.k_proj"][0]
        channels = shape["mlp.gate_proj"][0]
        expected = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (channels, hidden),
            "mlp.up_proj": (channels, hidden),
            "mlp.down_proj": (hidden, channels),
        }
        for name in shape:
            if shape[name] != expected[name] or query % head_dim or key % head_dim or query % key:
                raise ValueError(
                    f"{file}: model.layers.{index}.{name} has shape {shape[name]}, which does not fit {expected[name]} "
                    f"with a head size of {head_dim}"
                )


def _profile(
    config: Any,  # noqa: ANN401
    state: Mapping[str, torch.Tensor],
) -> tuple[list[LayerProfile], float]:
    profile, left, whole = [], 0, 0
    key_heads, head_dim = int(config.num_key_value_heads or 1), int(config.head_dim or 1)  # `_config` has set both
    rows = (config.num_attention_heads + key_heads) * 2 * head_dim + 3 * config.intermediate_size
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        size = sum(tensor.numel() for name, tensor in state.items() if name.startswith(prefix))
        cut = sum(state[f"{prefix}{name}.weight"].numel() for name in PROJECTION_NAMES)
        dense = size - cut + config.hidden_size * rows
        heads = state[f"{prefix}self_attn.k_proj.weight"].shape[0] // head_dim
        channels = state[f"{prefix}mlp.gate_proj.weight"].shape[0]
        profile.append(
            LayerProfile(index, 1 - heads / key_heads, 1 - channels / config.intermediate_size, 1 - size / dense, 0.0)
        )
        left, whole = left + size, whole + dense
    return profile, 1 - left / whole


def _named_tokenizer(name: str | PathLike[str]) -> Any:  # noqa: ANN401
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load a tokenizer from {name}: {' '.join(str(error).split())}") from error


def _tokenizer(stub: Any, scratch: Path) -> Any:  # noqa: ANN401
    """Rebuilds a pickled tokenizer; returns None if it cannot be read."""
    attributes = getattr(stub, "__dict__", {})
    special = {name: token for name in _SPECIAL if (token := _token(attributes, name)) is not None}
    try:
        if isinstance(backend := attributes.get("_tokenizer"), _Stub):
            from tokenizers import Tokenizer

            serialized = backend.__dict__.get("_state")
            if isinstance(serialized, bytes):
                fast = Tokenizer.from_str(serialized.decode())
                return PreTrainedTokenizerFast(tokenizer_object=fast, **special)  # type: ignore[no-untyped-call]
        proto = attributes.get("sp_model_proto")
        if isinstance(proto, bytes):
            from transformers import LlamaTokenizer

            (scratch / "tokenizer.model").write_bytes(proto)
            adds = {
                name: bool(attributes.get(name, name == "add_bos_token")) for name in ("add_bos_token", "add_eos_token")
            }
            return LlamaTokenizer.from_pretrained(scratch, **special, **adds)  # type: ignore[arg-type]
    except Exception:  # parsers raise anything on damaged content; a model without its tokenizer is still useful
        return None
    return None


def _token(attributes: Mapping[str, Any], name: str) -> str | None:
    token = attributes.get(f"_{name}")
    if token is None and isinstance(attributes.get("_special_tokens_map"), Mapping):
        token = attributes["_special_tokens_map"].get(name)
    if isinstance(token, _Stub):
        token = token.__dict__.get("content")
    return token if isinstance(token, str) else None
