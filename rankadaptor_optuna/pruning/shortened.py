"""Depth pruning: whole blocks removed, as Shortened LLaMA does (arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rankadaptor_optuna.pruning.config import BlockCriterion
from rankadaptor_optuna.pruning.gradients import Gradient, Gradients, Progress, evaluation_mode
from rankadaptor_optuna.pruning.importance import parameter_importance
from rankadaptor_optuna.pruning.streaming import BlockStream
from rankadaptor_optuna.pruning.structure import PROJECTION_NAMES, transformer_layers


def block_importance(
    model: nn.Module,
    samples: torch.Tensor,
    layers: Sequence[int],
    *,
    criterion: BlockCriterion = "ppl",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Scores whole transformer blocks.

    * `"ppl"`: the calibration loss (log perplexity) of the model without the block;
    * `"taylor"`: the sum of |w g| over the block's projections, g being the gradient of the mean calibration loss;
    * `"magnitude"`: the sum of |w| over them;
    * `"random"`: a random number.

    Args:
        model: A LLaMA-like causal language model; it is left as it was.
        samples: Token ids, (samples, tokens).
        layers: Which blocks to score, by index.
        criterion: See above.
        seed: Of "random".
        progress: Called with (blocks done, blocks in all).

    Returns:
        Importance by layer; the lowest goes first.

    Raises:
        ValueError: The token ids do not fit the model, or what is measured is not finite.
    """
    if criterion == "random":
        values = torch.rand(len(layers), generator=torch.Generator().manual_seed(seed)).tolist()
        return dict(zip(layers, values, strict=True))
    blocks = transformer_layers(model)
    names = [f"{name}.weight" for name in PROJECTION_NAMES]
    found: dict[int, float] = {}

    def score(layer: int, gradients: Mapping[str, Gradient] | None) -> None:
        found[layer] = 0.0
        for name in names:
            how, gradient = ("l1", None) if gradients is None else ("param_first", gradients[name])
            found[layer] += float(parameter_importance(how, blocks[layer].get_parameter(name), gradient).sum())

    if criterion == "magnitude":
        for layer in layers:
            score(layer, None)
        return found
    with evaluation_mode(model):
        stream = BlockStream(model, samples)
        if criterion == "taylor":
            Gradients(stream, progress=progress).walk(dict.fromkeys(layers, names), score)
            return found
        return _losses_without(stream, layers, progress)


@torch.no_grad()
def _losses_without(stream: BlockStream, layers: Sequence[int], progress: Progress | None) -> dict[int, float]:
    """Mean loss without each block in turn; what comes before the block is computed once for all."""
    losses: dict[int, float] = {}
    hidden = stream.embed()
    for index in range(max(layers) + 1):
        if index in layers:
            state = hidden
            for later in range(index + 1, len(stream.layers)):
                state = stream.advance(later, state)
            losses[index] = sum(float(stream.loss(i, h)) for i, h in enumerate(state)) / len(state)
            if progress is not None:
                progress(len(losses), len(layers))
        hidden = stream.advance(index, hidden)
    if not all(torch.isfinite(torch.tensor(list(losses.values())))):
        raise ValueError("the calibration loss is not finite: load the model with dtype=torch.bfloat16 or float32")
    return losses


def select_blocks(importance: Mapping[int, float], *, ratio: float, n_layers: int) -> list[int]:
    """Blocks to keep when the least important go: as many as come nearest to a share of all blocks.

    Args:
        importance: Of the blocks that may go, by layer.
        ratio: Share of all blocks to remove.
        n_layers: Number of all blocks.

    Returns:
        Layers to keep, in rising order.

    Raises:
        ValueError: No block would go, or more than may; the message says which ratios are possible.
    """
    n_gone = round(ratio * n_layers)
    if not 1 <= n_gone <= len(importance):
        raise ValueError(
            f"ratio={ratio} of {n_layers} blocks is {n_gone} whole blocks, and {len(importance)} may be removed: the "
            f"smallest possible ratio is {1 / n_layers:.4f}, the largest {len(importance) / n_layers:.4f}; "
            "change ratio, keep_first or keep_last"
        )
    gone = sorted(importance, key=lambda layer: (importance[layer], layer))[:n_gone]
    return [layer for layer in range(n_layers) if layer not in gone]
