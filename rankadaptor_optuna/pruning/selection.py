"""Which units to remove: the least important, until a given share of all block parameters is gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from rankadaptor_optuna.pruning.structure import LayerShape


@dataclass(frozen=True)
class Costs:
    """What there is to remove, in parameters.

    Attributes:
        head: Parameters of one key-value head with its query heads.
        channel: Parameters of one MLP channel.
        total: Parameters of all transformer blocks, kept ones too.
    """

    head: int
    channel: int
    total: int


def chunk_sizes(channels: int, multiple_of: int) -> list[int]:
    """Cut a layer's channels into the portions in which they go, the one that always stays left out.

    Whatever goes, the width left is a multiple of `multiple_of`. For a layer narrower than that, the largest
    proper divisor of its width takes its place.
    """
    if channels < multiple_of:
        multiple_of = next(size for size in range(max(1, channels // 2), 0, -1) if channels % size == 0)
    first = channels % multiple_of
    return [first] * (first > 0) + [multiple_of] * (channels // multiple_of - 1)


def largest_removable(shape: LayerShape, costs: Costs, multiple_of: int) -> int:
    """Most parameters that can go from a layer, which keeps a head and a portion of channels."""
    channels = sum(chunk_sizes(shape.channels, multiple_of))
    return (shape.heads - 1) * costs.head + channels * costs.channel


def check_reachable(ratio: float, removable: int, costs: Costs, n_layers: int) -> None:
    """Check that a ratio can be reached.

    Args:
        ratio: Share of `costs.total` to remove.
        removable: Parameters that can go (`largest_removable` of all layers).
        costs: What there is.
        n_layers: How many layers may be pruned, for the message.

    Raises:
        ValueError: It cannot; the message says which can.
    """
    if ratio * costs.total > removable:
        largest = math.floor(removable / costs.total * 1e4) / 1e4
        raise ValueError(
            f"ratio={ratio} cannot be reached: with {n_layers} prunable layers the largest possible ratio "
            f"is {largest}; lower ratio, keep_first, keep_last or multiple_of"
        )


def select_kept(
    heads: Mapping[int, torch.Tensor],
    channels: Mapping[int, torch.Tensor],
    *,
    ratio: float,
    costs: Costs,
    multiple_of: int,
    local: bool = False,
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Rank the units and keep the most important ones.

    Heads and channels are ranked apart, as LLM-Pruner's global pruning does, and lose about the same share.
    Heads are coarse: as many go as is nearest to that share; the channels make up the rest, in portions of
    `multiple_of` so that widths stay multiples of it. Every layer keeps a head and a portion of channels.

    Args:
        heads: By layer, the importance of each head.
        channels: By layer, the importance of each channel.
        ratio: Share of `costs.total` to remove.
        costs: Parameters of the units and of all blocks.
        multiple_of: Widths are multiples of this.
        local: Rank within each layer, so that all lose the same share, to within one head and one portion of
            channels. Default: all layers together.

    Returns:
        By layer, the heads and the channels to keep, in rising order.

    Raises:
        ValueError: More is asked than can go; the message says how much can.
    """
    shapes = [LayerShape(len(heads[layer]), len(channels[layer])) for layer in heads]
    removable = sum(largest_removable(shape, costs, multiple_of) for shape in shapes)
    check_reachable(ratio, removable, costs, len(heads))
    target = ratio * costs.total
    n_heads = sum(shape.heads for shape in shapes)
    spare_heads = sum(shape.heads - 1 for shape in shapes)
    all_units = sum(shape.heads * costs.head + shape.channels * costs.channel for shape in shapes)
    spare_channels = removable - spare_heads * costs.head
    gone_heads = round(target / all_units * n_heads)
    gone_heads = max(gone_heads, math.ceil((target - spare_channels) / costs.head))
    gone_heads = min(gone_heads, math.floor(target / costs.head), spare_heads)

    kept_heads = _drop_lowest(heads, gone_heads, local)
    kept_channels = _drop_portions(channels, (target - gone_heads * costs.head) / costs.channel, multiple_of, local)
    return kept_heads, kept_channels


def _drop_lowest(importance: Mapping[int, torch.Tensor], n_gone: int, local: bool) -> dict[int, list[int]]:
    kept = {layer: list(range(len(values))) for layer, values in importance.items()}
    ranking = sorted(
        (turn / len(values) if local else 0.0, float(values[unit]), layer, int(unit))
        for layer, values in importance.items()
        for turn, unit in enumerate(torch.argsort(values, stable=True))
    )
    for _, _, layer, unit in ranking:
        if n_gone > 0 and len(kept[layer]) > 1:
            kept[layer].remove(unit)
            n_gone -= 1
    return kept


def _drop_portions(
    importance: Mapping[int, torch.Tensor], n_gone: float, multiple_of: int, local: bool
) -> dict[int, list[int]]:
    """Drop portions of channels, lowest mean importance first, until about `n_gone` channels are gone."""
    portions: list[tuple[float, float, int, int]] = []
    order: dict[int, torch.Tensor] = {}
    for layer, values in importance.items():
        order[layer] = torch.argsort(values, stable=True)
        start, mean = 0, 0.0
        for size in chunk_sizes(len(values), multiple_of):
            # Channels rise along the order; despite rounding so must the means, for portions to go in turn.
            mean = max(mean, float(values[order[layer][start : start + size]].double().mean()))
            portions.append((start / len(values) if local else 0.0, mean, layer, size))
            start += size
    portions.sort(key=lambda portion: portion[:3])
    n_portions = nearest([size for *_, size in portions], n_gone)

    gone = dict.fromkeys(importance, 0)
    for *_, layer, size in portions[:n_portions]:
        gone[layer] += size
    return {layer: sorted(order[layer][gone[layer] :].tolist()) for layer in importance}


def nearest(sizes: Sequence[int], target: float) -> int:
    """How many of the first sizes add up to nearest the target."""
    sums = list(accumulate(sizes, initial=0))
    return min(range(len(sums)), key=lambda n: abs(sums[n] - target))
