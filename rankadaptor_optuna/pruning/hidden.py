"""Channel-wise pruning: the hidden size made smaller through the whole model, as LLM-Pruner's channel mode does."""

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

_EMBEDDING = "model.embed_tokens.weight"
# The dimension of each parameter along which the hidden channels lie, by the end of its name; others have none.
_DIMENSIONS = {
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


def _dimension(name: str) -> int | None:
    return next((dim for end, dim in _DIMENSIONS.items() if name.endswith(end)), None)


def coupled_size(layer: nn.Module) -> int:
    """Number of a block's parameters that the hidden channels share out: nearly all."""
    return sum(p.numel() for name, p in layer.named_parameters() if _dimension(name) is not None)


def hidden_importance(
    model: PreTrainedModel,
    samples: torch.Tensor,
    *,
    criterion: Criterion = "param_first",
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Scores the channels of the hidden state: the sum of the importance of all parameters that go with one.

    These are its entries in the embedding, the head, all norms and all projections. Tied embeddings count at either
    use.

    Args:
        model: A LLaMA-like causal language model; it is left as it was.
        samples: Token ids, (samples, tokens).
        criterion: See `unit_importance`.
        seed: Of "random".
        progress: Called with (blocks done, blocks in all).

    Returns:
        (hidden size,), float32 on the CPU.

    Raises:
        ValueError: See `unit_importance`.
    """
    total = torch.zeros(model.get_parameter("model.embed_tokens.weight").shape[1], dtype=torch.float64)
    if criterion == "random":
        return torch.rand(len(total), generator=torch.Generator().manual_seed(seed))

    def add(weights: dict[str, nn.Parameter], gradients: dict[str, Gradient] | None) -> None:
        for name, weight in weights.items():
            scores = parameter_importance(criterion, weight, None if gradients is None else gradients[name])
            total.add_(scores.movedim(_dimension(name) or 0, 0).reshape(len(total), -1).sum(1).double().cpu())

    everything = dict(model.named_parameters())
    if not needs_gradients(criterion):
        add({name: p for name, p in everything.items() if _dimension(name) is not None}, None)
        return total.float()
    blocks = transformer_layers(model)
    ends = {name: model.get_parameter(name) for name in ("model.norm.weight", "lm_head.weight", _EMBEDDING)}
    wanted = {
        layer: [name for name, _ in block.named_parameters() if _dimension(name) is not None]
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
    """Hidden channels to keep when the least important go.

    Args:
        importance: (hidden size,).
        ratio: Share of all block parameters to remove.
        share: Share of the block parameters that would go with all channels.
        heads: Attention heads of a layer. The width left is a multiple of their number, as ordinary configs want it.
        multiple_of: It is a multiple of this too where one comes within half a point of the ratio.

    Returns:
        Channels in rising order.

    Raises:
        ValueError: The ratio cannot be reached.
    """
    width, wanted = len(importance), (1 - ratio / share) * len(importance)
    step = math.lcm(heads, multiple_of)
    if abs(step * round(wanted / step) - wanted) / width * share > 0.005:
        step = heads
    left = step * round(wanted / step)
    if not 0 < left < width:
        raise ValueError(
            f"ratio={ratio} would leave {left} of {width} hidden channels: the smallest possible ratio is "
            f"{step / width * share:.4f}, the largest {(1 - step / width) * share:.4f}"
        )
    return sorted(torch.argsort(importance, stable=True)[width - left :].tolist())


def keep_hidden(model: PreTrainedModel, kept: list[int]) -> dict[str, torch.Tensor]:
    """Cuts all parameters of a model down to some channels of its hidden state: new tensors by name, on the CPU."""
    return {
        name: tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device)).cpu()
        for name, tensor in model.state_dict().items()
        if (dim := _dimension(name)) is not None
    }
