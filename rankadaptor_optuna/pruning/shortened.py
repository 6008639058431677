"""Depth pruning: removes whole blocks, as Shortened LLaMA does (arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rankadaptor_optuna.pruning.blocks import importance_by_whole_model
from rankadaptor_optuna.pruning.config import BlockCriterion
from rankadaptor_optuna.pruning.gradients import Gradient, Gradients, Progress, evaluation_mode
from rankadaptor_optuna.pruning.importance import parameter_importance
from rankadaptor_optuna.pruning.streaming import BlockStream
from rankadaptor_optuna.pruning.structure import PROJECTION_NAMES, has_units, transformer_layers


def block_importance(
    model: nn.Module,
    samples: torch.Tensor,
    layers: Sequence[int],
    *,
    criterion: BlockCriterion = "ppl",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Scores whole transformer blocks by the criteria of Shortened LLaMA.

    * `"ppl"`: the calibration loss (log perplexity) of the model without the block;
    * `"taylor"`: the sum of |w g| over the block's projections, g being the gradient of the mean calibration loss;
    * `"magnitude"`: the sum of |w| over the block's projections;
    * `"random"`: a random number.

    Args:
        model: A causal language model with a list of blocks; it is not changed.
        samples: Token ids, (samples, tokens).
        layers: Indices of the blocks to score.
        criterion: One of the criteria above.
        seed: Seed of `"random"`.
        progress: Called with (blocks done, blocks in all).

    Returns:
        Importance by layer; the least important block is removed first.

    Raises:
        ValueError: A token id is outside the model's vocabulary, or a loss or gradient is not finite.
    """
    if criterion == "random":
        values = torch.rand(len(layers), generator=torch.Generator().manual_seed(seed)).tolist()
        return dict(zip(layers, values, strict=True))
    if not has_units(model):
        return importance_by_whole_model(model, samples, layers, criterion, progress)
    blocks = transformer_layers(model)
    names = [f"{name}.weight" for name in PROJECTION_NAMES]
    importance: dict[int, float] = {}

    def score(layer: int, gradients: Mapping[str, Gradient] | None) -> None:
        importance[layer] = 0.0
        for name in names:
            term, gradient = ("l1", None) if gradients is None else ("param_first", gradients[name])
            importance[layer] += float(parameter_importance(term, blocks[layer].get_parameter(name), gradient).sum())

    if criterion == "magnitude":
        for layer in layers:
            score(layer, None)
        return importance
    with evaluation_mode(model):
        stream = BlockStream(model, samples)
        if criterion == "taylor":
            Gradients(stream, progress=progress).walk(dict.fromkeys(layers, names), score)
            return importance
        return _losses_without(stream, layers, progress)


@torch.no_grad()
def _losses_without(stream: BlockStream, layers: Sequence[int], progress: Progress | None) -> dict[int, float]:
    """Returns the mean loss without each block in turn; the blocks before it run once for all."""
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
    """Selects the blocks to keep: the least important are removed, as many as come nearest to the ratio.

    Args:
        importance: Importance of the blocks that may be removed, by layer.
        ratio: Share of all blocks to remove.
        n_layers: Number of all blocks.

    Returns:
        Layers to keep, in rising order.

    Raises:
        ValueError: The ratio amounts to no block, or to more than may be removed; the message gives the possible range.
    """
    n_gone = n_removed(ratio, n_layers, len(importance))
    gone = sorted(importance, key=lambda layer: (importance[layer], layer))[:n_gone]
    return [layer for layer in range(n_layers) if layer not in gone]


def n_removed(ratio: float, n_layers: int, n_removable: int) -> int:
    """Returns the number of blocks whose removal comes nearest to a ratio; see `select_blocks`.

    Raises:
        ValueError: The ratio amounts to no block, or to more than may be removed; the message gives the possible range.
    """
    n_gone = round(ratio * n_layers)
    if not 1 <= n_gone <= n_removable:
        raise ValueError(
            f"ratio={ratio} of {n_layers} blocks is {n_gone} whole blocks, and {n_removable} may be removed: the "
            f"smallest possible ratio is {1 / n_layers:.4f}, the largest {n_removable / n_layers:.4f}; "
            "change ratio, keep_first or keep_last"
        )
    return n_gone
