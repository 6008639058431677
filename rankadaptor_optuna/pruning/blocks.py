"""Removal of whole blocks from a decoder of any family, by its configuration and its list of blocks alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rankadaptor_optuna.llm.adaptable import check_adaptable, features, path_of_layers
from rankadaptor_optuna.pruning.calibration import check_vocabulary
from rankadaptor_optuna.pruning.config import BlockCriterion
from rankadaptor_optuna.pruning.gradients import Gradient, Progress, evaluation_mode
from rankadaptor_optuna.pruning.importance import parameter_importance

# Lists of layer indices in configurations; other lists with one entry per layer are recognised by their length.
_INDEX_LISTS = ("mlp_only_layers", "attn_layer_indices", "moe_layers", "hybrid_layer_ids", "full_attn_idxs")
_NOT_BY_LAYER = ("token_id", "architectures", "multipliers")
_FIRST = ("first_k_dense_replace", "moe_layer_start_index")  # number of first blocks without experts
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of logits, relative to the largest; set by hand
_COARSE = 5e-2  # the same in 16 bits, where devices differ
_OWN = ("training", "gradient_checkpointing")  # attributes of a module's state, not of its design
_PLAIN = (bool, int, float, str, type(None))


def check_unquantised(model: nn.Module) -> None:
    """Checks that the weights of a model are numbers.

    Raises:
        ValueError: They are quantised.
    """
    linears = (module for module in model.modules() if features(module) is not None)
    if any(not p.is_floating_point() for module in linears for p in module.parameters()):
        raise ValueError(f"cannot prune {type(model).__name__}: its weights are quantised; load the model unquantised")


def block_list(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Finds the list of blocks of a model's text decoder.

    Returns:
        (its dotted name, the blocks).

    Raises:
        ValueError: There is none, or several, or the model is quantised, adapted or an encoder-decoder.
    """
    check_adaptable(model)
    check_unquantised(model)
    path, _ = path_of_layers(model, [name for name, module in model.named_modules() if features(module) is not None])
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        kind = type(blocks).__name__
        raise ValueError(f"cannot prune {type(model).__name__}: {path} is a {kind}, not a list of blocks")
    return path, list(blocks)


@contextmanager
def skipped(blocks: Sequence[nn.Module], gone: Collection[int]) -> Iterator[None]:
    """Makes a model compute as without some blocks: each returns its input."""

    def give_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    hooks = [blocks[index].register_forward_hook(give_back, with_kwargs=True) for index in gone]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def importance_by_whole_model(
    model: nn.Module,
    samples: torch.Tensor,
    layers: Sequence[int],
    criterion: BlockCriterion,
    progress: Progress | None,
) -> dict[int, float]:
    """Scores blocks as ``block_importance`` does, with passes through the whole model, of any family.

    Raises:
        ValueError: A loss or gradient is not finite, or a token id is outside the vocabulary.
    """
    _, blocks = block_list(model)
    if criterion == "magnitude":
        return {layer: _summed(blocks[layer], None) for layer in layers}
    with evaluation_mode(model):
        if criterion == "taylor":
            return _taylor(model, samples, {layer: blocks[layer] for layer in layers}, progress)
        importance = {}
        for layer in layers:
            with torch.no_grad(), skipped(blocks, [layer]):
                importance[layer] = sum(float(_loss(model, row)) for row in samples) / len(samples)
            _check_finite(importance[layer])
            if progress is not None:
                progress(len(importance), len(layers))
    return importance


def _loss(model: nn.Module, row: torch.Tensor) -> torch.Tensor:
    logits = _logits(model, row)[:-1].float()
    return nn.functional.cross_entropy(logits, row[1:].to(logits.device))


def _logits(model: Any, row: torch.Tensor, *, use_cache: bool = False) -> torch.Tensor:  # noqa: ANN401
    embedding = model.get_input_embeddings()
    check_vocabulary(row, embedding.weight.shape[0])
    return model(input_ids=row[None].to(embedding.weight.device), use_cache=use_cache).logits[0]


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError("the calibration loss is not finite: load the model with dtype=torch.bfloat16 or float32")


def _matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights of a block's linear modules, experts included, by name."""
    return {name: p for name, p in block.named_parameters() if p.ndim > 1}


def _summed(block: nn.Module, gradients: Mapping[str, torch.Tensor] | None) -> float:
    total = 0.0
    for name, weight in _matrices(block).items():
        gradient = None if gradients is None else Gradient(gradients[name], torch.zeros(()))
        term = "l1" if gradient is None else "param_first"
        total += float(parameter_importance(term, weight, gradient).sum())
    return total


def _taylor(
    model: nn.Module, samples: torch.Tensor, blocks: Mapping[int, nn.Module], progress: Progress | None
) -> dict[int, float]:
    weights = {(layer, name): p for layer, block in blocks.items() for name, p in _matrices(block).items()}
    sums = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in weights.items()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    for done, row in enumerate(samples, 1):
        gradients = torch.autograd.grad(_loss(model, row), list(weights.values()), allow_unused=True)
        for key, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                sums[key] += gradient.float() / len(samples)
        if progress is not None:
            progress(done, len(samples))
    importance = {
        layer: _summed(block, {name: total for (at, name), total in sums.items() if at == layer})
        for layer, block in blocks.items()
    }
    for value in importance.values():
        _check_finite(value)
    return importance


def without_blocks(
    model: PreTrainedModel, kept: Sequence[int], pruning: Mapping[str, Any], sample: torch.Tensor
) -> PreTrainedModel:
    """Makes a model of the same class with some of the blocks, on the CPU.

    Args:
        model: The dense model; it is not changed and shares no memory with the new model.
        kept: The blocks to keep, in rising order.
        pruning: Record of the pruning for the config, JSON-able.
        sample: Token ids, (tokens,), on which the new model must compute as the dense one without the other blocks.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: The class cannot be built with these blocks, or computes something else then.
    """
    path, blocks = block_list(model)
    new = _copied(model, path, blocks, kept)
    _follow_config(new, kept, len(blocks))
    new.config.pruning = dict(pruning)
    new.eval()
    gone = [index for index in range(len(blocks)) if index not in kept]
    with evaluation_mode(model), torch.no_grad(), skipped(blocks, gone):
        expected = _logits(model, sample).float().cpu()
        try:
            found = _logits(new, sample, use_cache=True).float()  # some caches need blocks of a kind
        except Exception as error:  # code of any family
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{type(model).__name__} does not run without blocks {gone}: {reason}") from error
    most = _TOLERANCE.get(model.dtype, _COARSE) if model.device.type == "cpu" else _COARSE
    if not (found - expected).abs().max() <= most * expected.abs().max():
        raise ValueError(
            f"cannot remove whole blocks from {type(model).__name__}: its blocks compute by their position or number, "
            "so those that stay would change"
        )
    return new


def _copied(model: PreTrainedModel, path: str, blocks: Sequence[nn.Module], kept: Sequence[int]) -> Any:  # noqa: ANN401
    """Returns a copy in main memory without the other blocks, whose tensors are not copied."""
    memo: dict[int, Any] = {id(block): nn.Identity() for index, block in enumerate(blocks) if index not in kept}
    gone = tuple(f"{path}.{index}." for index in range(len(blocks)) if index not in kept)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(gone):
            copied = nn.Parameter(parameter.detach().to("cpu", copy=True), parameter.requires_grad)
            memo.setdefault(id(parameter), copied)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not name.startswith(gone):
            memo.setdefault(id(buffer), buffer.detach().to("cpu", copy=True))
    new = copy.deepcopy(model, memo)
    new.set_submodule(path, nn.ModuleList(new.get_submodule(path)[index] for index in kept))  # type: ignore[index]
    return new


def _adjust(config: Any, kept: Sequence[int], n_blocks: int) -> None:  # noqa: ANN401
    """Changes a configuration to the blocks that stay."""
    new_index = {old: new for new, old in enumerate(kept)}
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and name in _INDEX_LISTS:
            setattr(config, name, [new_index[index] for index in value if index in new_index])
        elif name in _FIRST and isinstance(value, int):
            setattr(config, name, sum(index < value for index in kept))
        elif isinstance(value, (list, tuple)) and len(value) == n_blocks and not name.endswith(_NOT_BY_LAYER):
            setattr(config, name, [value[index] for index in kept])
    if hasattr(config, "attention_types"):  # GPT-Neo's shorter form of attention_layers
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    if hasattr(config, "block_types"):  # RecurrentGemma's pattern, which repeats
        config.block_types = [config.block_types[index % len(config.block_types)] for index in kept]
    if config.num_hidden_layers != len(kept):
        config.num_hidden_layers = len(kept)


def _follow_config(new: Any, kept: Sequence[int], n_blocks: int) -> None:  # noqa: ANN401
    """Adjusts a copy's configuration, and makes its modules as the class builds them from it, their index above all.

    Raises:
        ValueError: The class cannot be built, or has other weights then.
    """
    name = type(new).__name__
    try:
        _adjust(new.config.get_text_config(), kept, n_blocks)
        with torch.device("meta"):
            fresh = type(new)(copy.deepcopy(new.config))
    except Exception as error:  # constructors and validators of any family
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot remove whole blocks from {name}, whose configuration is then: {reason}") from error
    designed = {key: (tuple(t.shape), t.dtype.is_floating_point) for key, t in fresh.state_dict().items()}
    actual = {key: (tuple(t.shape), t.dtype.is_floating_point) for key, t in new.state_dict().items()}
    if odd := sorted(key for key in designed.keys() | actual.keys() if designed.get(key) != actual.get(key)):
        raise ValueError(
            f"cannot remove whole blocks from {name}: {odd[0]} depends on their number or order; "
            "other blocks may do (keep_first, keep_last)"
        )
    modules = dict(fresh.named_modules(remove_duplicate=False))
    for path, module in new.named_modules(remove_duplicate=False):
        for key, value in vars(modules.get(path, module)).items():
            own = vars(module).get(key, ...)
            if not key.startswith("_") and key not in _OWN and _is_plain(value) and _is_plain(own) and own != value:
                setattr(module, key, copy.copy(value))
    if hasattr(fresh, "all_tied_weights_keys"):
        new.all_tied_weights_keys = fresh.all_tied_weights_keys


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))
