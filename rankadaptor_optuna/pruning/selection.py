"""Selects the units to keep: the least important are removed until the ratio is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from rankadaptor_optuna.pruning.structure import LayerShape


@dataclass(frozen=True)
class Costs:
    """Sizes in parameters.

    Attributes:
        head: One key-value head with its query heads.
        channel: One MLP channel.
        total: All transformer blocks, including those that stay whole.
    """

    head: int
    channel: int
    total: int


def chunk_sizes(channels: int, multiple_of: int) -> list[int]:
    """Returns the sizes of the portions in which a layer's channels are removed, in order.

    After each portion the width is a multiple of `multiple_of`, or, in a layer narrower than `multiple_of`, of the
    largest proper divisor of the layer's width. The last portion of the width always stays and is not listed.
    """
    if channels < multiple_of:
        multiple_of = next(size for size in range(max(1, channels // 2), 0, -1) if channels % size == 0)
    first = channels % multiple_of
    return [first] * (first > 0) + [multiple_of] * (channels // multiple_of - 1)


def largest_removable(shape: LayerShape, costs: Costs, multiple_of: int) -> int:
    """Returns the most parameters that a layer can lose; it keeps one head and one portion of channels."""
    channels = sum(chunk_sizes(shape.channels, multiple_of))
    return (shape.heads - 1) * costs.head + channels * costs.channel


def check_reachable(ratio: float, removable: int, costs: Costs, n_layers: int) -> None:
    """Checks that a ratio can be reached.

    Args:
        ratio: Share of `costs.total` to remove.
        removable: Parameters that can be removed (`largest_removable` of all layers).
        costs: Sizes.
        n_layers: Number of layers that may be pruned, for the message.

    Raises:
        ValueError: The ratio is too large; the message gives the largest possible one.
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
    """Ranks the units and selects the most important ones.

    Heads and channels are ranked separately, as in LLM-Pruner's global pruning, and lose about the same share. Heads
    are coarse: their number removed is the nearest to this share, and channels make up for the difference, in portions
    of `multiple_of`, so that widths stay multiples of it. Every layer keeps one head and one portion of channels.

    Args:
        heads: By layer, the importance of each head.
        channels: By layer, the importance of each channel.
        ratio: Share of `costs.total` to remove.
        costs: Sizes of the units and of all blocks.
        multiple_of: Widths are multiples of this.
        local: Whether to rank within each layer, so that all lose the same share, to within one head and one portion
            of channels. Default: rank all layers together.

    Returns:
        By layer, the heads and the channels to keep, in rising order.

    Raises:
        ValueError: The ratio is too large; the message gives the largest possible one.
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
        (rank / len(values) if local else 0.0, float(values[unit]), layer, int(unit))
        for layer, values in importance.items()
        for rank, unit in enumerate(torch.argsort(values, stable=True))
    )
    for _, _, layer, unit in ranking:
        if n_gone > 0 and len(kept[layer]) > 1:
            kept[layer].remove(unit)
            n_gone -= 1
    return kept


def _drop_portions(
    importance: Mapping[int, torch.Tensor], n_gone: float, multiple_of: int, local: bool
) -> dict[int, list[int]]:
    """Drops portions of channels, lowest mean importance first, until about `n_gone` channels are gone."""
    portions: list[tuple[float, float, int, int]] = []
    order: dict[int, torch.Tensor] = {}
    for layer, values in importance.items():
        order[layer] = torch.argsort(values, stable=True)
        start, mean = 0, 0.0
        for size in chunk_sizes(len(values), multiple_of):
            # portions of a layer must be removed in order, so their means must not fall through rounding
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
    """Returns how many of the first sizes have the sum nearest to the target."""
    sums = list(accumulate(sizes, initial=0))
    return min(range(len(sums)), key=lambda n: abs(sums[n] - target))
