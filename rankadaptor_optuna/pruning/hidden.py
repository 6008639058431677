"""Hidden-channel pruning: reduces the hidden size of the whole model (LLM-Pruner's `--channel_wise`)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from rankadaptor_optuna.pruning.config import Criterion
from rankadaptor_optuna.pruning.gradients import Gradient, Gradients, Progress, evaluation_mode
from rankadaptor_optuna.pruning.importance import needs_gradients, parameter_importance
from rankadaptor_optuna.pruning.streaming import BlockStream
from rankadaptor_optuna.pruning.structure import transformer_layers

_TOLERANCE = 0.005  # of the ratio, within which the width is rounded to `multiple_of`; set by hand
_EMBEDDING = "model.embed_tokens.weight"
# Dimension of a parameter along which the hidden channels lie, by the end of its name; other parameters have none.
# LLM-Pruner finds the same couplings by its dependency graph.
_HIDDEN_DIMS = {
    "embed_tokens.weight": 1,
    "lm_head.weight": 1,
    "input_layernorm.weight": 0,
    "post_attention_layernorm.weight": 0,
    "model.norm.weight": 0,
    "q_proj.weight": 1,
    "k_proj.weight": 1,
    "v_proj.weight": 1,
    "o_proj.weight": 0,
    "o_proj.bias": 0,
    "gate_proj.weight": 1,
    "up_proj.weight": 1,
    "down_proj.weight": 0,
    "down_proj.bias": 0,
}


def _hidden_dim(name: str) -> int | None:
    return next((dim for end, dim in _HIDDEN_DIMS.items() if name.endswith(end)), None)


def coupled_size(layer: nn.Module) -> int:
    """Returns the number of a block's parameters that belong to hidden channels: nearly all."""
    return sum(p.numel() for name, p in layer.named_parameters() if _hidden_dim(name) is not None)


def hidden_importance(
    model: PreTrainedModel,
    samples: torch.Tensor,
    *,
    criterion: Criterion = "param_first",
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Scores the channels of the hidden state by the summed importance of all their parameters.

    A channel's parameters are its entries in the embedding, the head, all norms and all projections. Tied embeddings
    count once for each use.

    Args:
        model: A LLaMA-like causal language model; it is not changed.
        samples: Token ids, (samples, tokens).
        criterion: See `unit_importance`.
        seed: Seed of `"random"`.
        progress: Called with (blocks done, blocks in all).

    Returns:
        Importance, (hidden size,), float32 on the CPU.

    Raises:
        ValueError: See `unit_importance`.
    """
    total = torch.zeros(model.get_parameter("model.embed_tokens.weight").shape[1], dtype=torch.float64)
    if criterion == "random":
        return torch.rand(len(total), generator=torch.Generator().manual_seed(seed))

    def add(weights: dict[str, nn.Parameter], gradients: dict[str, Gradient] | None) -> None:
        for name, weight in weights.items():
            scores = parameter_importance(criterion, weight, None if gradients is None else gradients[name])
            total.add_(scores.movedim(_hidden_dim(name) or 0, 0).reshape(len(total), -1).sum(1).double().cpu())

    everything = dict(model.named_parameters())
    if not needs_gradients(criterion):
        add({name: p for name, p in everything.items() if _hidden_dim(name) is not None}, None)
        return total.float()
    blocks = transformer_layers(model)
    ends = {name: model.get_parameter(name) for name in ("model.norm.weight", "lm_head.weight", _EMBEDDING)}
    wanted = {
        layer: [name for name, _ in block.named_parameters() if _hidden_dim(name) is not None]
        for layer, block in enumerate(blocks)
    }

    def visit(index: int, gradients: dict[str, Gradient]) -> None:
        inside = 0 <= index < len(blocks)
        add({name: blocks[index].get_parameter(name) if inside else ends[name] for name in gradients}, gradients)

    with evaluation_mode(model):
        gradients = Gradients(BlockStream(model, samples), squares=criterion != "param_first", progress=progress)
        gradients.walk(wanted, visit, ends=ends)
    return total.float()


def select_hidden(importance: torch.Tensor, *, ratio: float, share: float, heads: int, multiple_of: int) -> list[int]:
    """Selects the hidden channels to keep: the least important are removed.

    Args:
        importance: Importance of the channels, (hidden size,).
        ratio: Share of all block parameters to remove.
        share: Share of the block parameters that belong to hidden channels.
        heads: Number of attention heads of a layer. The remaining width is a multiple of it, as ordinary configs need.
        multiple_of: The remaining width is also a multiple of this if one misses the ratio by 0.005 at most.

    Returns:
        Channels to keep, in rising order.

    Raises:
        ValueError: The ratio cannot be reached.
    """
    width, wanted = len(importance), (1 - ratio / share) * len(importance)
    step = math.lcm(heads, multiple_of)
    if abs(step * round(wanted / step) - wanted) / width * share > _TOLERANCE:
        step = heads
    left = step * round(wanted / step)
    if not 0 < left < width:
        raise ValueError(
            f"ratio={ratio} would leave {left} of {width} hidden channels: the smallest possible ratio is "
            f"{step / width * share:.4f}, the largest {(1 - step / width) * share:.4f}"
        )
    return sorted(torch.argsort(importance, stable=True)[width - left :].tolist())


def keep_hidden(model: PreTrainedModel, kept: list[int]) -> dict[str, torch.Tensor]:
    """Cuts a model's parameters down to some hidden channels and returns the new tensors by name, on the CPU."""
    return {
        name: tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device)).cpu()
        for name, tensor in model.state_dict().items()
        if (dim := _hidden_dim(name)) is not None
    }
