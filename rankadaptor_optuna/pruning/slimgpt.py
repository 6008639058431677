"""SlimGPT (arXiv 2412.18110): prunes layer by layer and corrects the remaining weights.

A layer's heads are removed from the inputs of o_proj, its MLP channels from those of down_proj, by the Optimal Brain
Surgeon (OBS): with W the projection's weight and H = X X^T of its inputs X, removing the columns g and correcting the
others leaves the squared output error tr(W_g [(H^-1)_gg]^-1 W_g^T), the least possible. "Batched Greedy Pruning" of the
paper: heads are removed one by one, the cheapest first; channels in batches, by the error of each alone
(W_c^2 / [H^-1]_cc), large batches first and then smaller ones. After every removal W and H^-1 are updated. Layers are
visited in order, attention before MLP, each on the hidden states of the model pruned so far.

The paper leaves some choices open; these are set by hand:

* H is damped by 1% of its mean diagonal.
* With grouped-query attention a head is a key-value head; its group is the columns of all its query heads.
* A batch is a quarter of the channels still to be removed.
* Heads and channels of a layer each lose the layer's ratio. Heads are coarse: their rounding error is passed on to the
  channels and to the next layers.
* A layer that can lose no more stays at its limit, and the others lose more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankadaptor_optuna.pruning.gradients import Progress, evaluation_mode
from rankadaptor_optuna.pruning.importance import Importance
from rankadaptor_optuna.pruning.selection import Costs, check_reachable, chunk_sizes, largest_removable, nearest
from rankadaptor_optuna.pruning.streaming import BlockStream
from rankadaptor_optuna.pruning.structure import UNIT_TYPES, UnitType, keep_units, layer_shape, unit_size

_GROWTH = 4.0  # last layer's ratio over the first's: 0.25 / 0.0625 in the paper's "Incremental Pruning Ratio" for 20%
_BATCH_SHARE = 4  # a batch is one in this many of the channels still to be removed; set by hand
_OUTPUTS: dict[UnitType, str] = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}


@dataclass(frozen=True)
class Compensated:
    """Result of SlimGPT.

    Attributes:
        kept: By unit type and layer, the units kept, in rising order.
        importance: By unit type and layer, the output error that the removal of each unit alone would leave in the
            unpruned layer: (units,), float32 on the CPU.
        weights: Cut and corrected weights of o_proj and down_proj by name, in the model's dtype, on the CPU.
    """

    kept: dict[UnitType, dict[int, list[int]]]
    importance: Importance
    weights: dict[str, torch.Tensor]


@torch.no_grad()
def slimgpt(
    model: nn.Module,
    samples: torch.Tensor,
    layers: Sequence[int],
    *,
    ratio: float,
    multiple_of: int,
    damping: float = 0.01,
    progress: Progress | None = None,
) -> Compensated:
    """Prunes heads and MLP channels layer by layer; see the module's docstring.

    The device holds one layer's copy and Hessian beside the model; hidden states of all samples are on the CPU.

    Args:
        model: A LLaMA-like causal language model; it is not changed.
        samples: Token ids, (samples, tokens). A Hessian of full rank needs more tokens than MLP channels.
        layers: Indices of the layers to prune, in rising order.
        ratio: Share of all block parameters to remove.
        multiple_of: MLP widths stay multiples of this (`chunk_sizes`).
        damping: Added to the Hessian's diagonal, as a share of its mean.
        progress: Called with (layers done, layers in all).

    Raises:
        ValueError: The ratio cannot be reached, or a Hessian is not finite.
    """
    kept: dict[UnitType, dict[int, list[int]]] = {unit_type: {} for unit_type in UNIT_TYPES}
    importance: Importance = {unit_type: {} for unit_type in UNIT_TYPES}
    weights: dict[str, torch.Tensor] = {}
    with evaluation_mode(model), torch.no_grad():
        stream = BlockStream(model, samples)
        quota = _Quota(stream.layers, layers, ratio, multiple_of)
        hidden = stream.embed()
        for index in range(max(layers) + 1):
            block = stream.layers[index]
            outputs = {unit_type: block.get_parameter(f"{name}.weight") for unit_type, name in _OUTPUTS.items()}
            before = {unit_type: weight.clone() for unit_type, weight in outputs.items()}
            try:
                for unit_type in UNIT_TYPES if index in layers else ():
                    surgeon = _Surgeon(outputs[unit_type], _hessian(stream, index, unit_type, hidden), damping)
                    n_units = layer_shape(block).count(unit_type)
                    width = outputs[unit_type].shape[1] // n_units
                    importance[unit_type][index] = surgeon.errors(range(n_units), width).float().cpu()
                    kept[unit_type][index] = surgeon.remove_units(n_units, quota.n_gone(index, unit_type), width)
                    outputs[unit_type].copy_(surgeon.weight)  # removed columns are 0: the block computes as if pruned
                    cut = keep_units(block, unit_type, kept[unit_type][index])[f"{_OUTPUTS[unit_type]}.weight"]
                    weights[f"model.layers.{index}.{_OUTPUTS[unit_type]}.weight"] = cut.cpu()
                hidden = stream.advance(index, hidden)
            finally:
                for unit_type, weight in outputs.items():
                    weight.copy_(before[unit_type])
            if progress is not None and index in layers:
                progress(len(kept["channels"]), len(layers))
    return Compensated(kept, importance, weights)


def layer_ratios(n_layers: int) -> list[float]:
    """Returns the paper's incremental pruning ratio, relative to the first layer's: 1 to 4, logarithmic in depth."""
    if n_layers == 1:
        return [1.0]
    return [1 + (_GROWTH - 1) * math.log(i + 1) / math.log(n_layers) for i in range(n_layers)]


class _Quota:
    """How many units to remove from each layer so that the ratio is met in all."""

    def __init__(self, blocks: Sequence[nn.Module], layers: Sequence[int], ratio: float, multiple_of: int) -> None:
        self._costs = Costs(
            head=unit_size(blocks[0], "heads"),
            channel=unit_size(blocks[0], "channels"),
            total=sum(p.numel() for block in blocks for p in block.parameters()),
        )
        self._shapes = {index: layer_shape(blocks[index]) for index in layers}
        self._multiple_of = multiple_of
        limits = [largest_removable(shape, self._costs, multiple_of) for shape in self._shapes.values()]
        target = ratio * self._costs.total
        check_reachable(ratio, sum(limits), self._costs, len(layers))
        sizes = [s.heads * self._costs.head + s.channels * self._costs.channel for s in self._shapes.values()]
        relative = layer_ratios(len(layers))
        low, high = 0.0, 1.0  # bisection of the first layer's ratio
        for _ in range(60):  # to double precision
            first = (low + high) / 2
            wanted = [min(first * r * size, limit) for r, size, limit in zip(relative, sizes, limits, strict=True)]
            low, high = (first, high) if sum(wanted) < target else (low, first)
        self._wanted = dict(zip(layers, zip(wanted, sizes, strict=True), strict=True))
        self._owed_heads = self._owed = 0.0  # rounding errors carried over, in heads and in parameters

    def n_gone(self, index: int, unit_type: UnitType) -> int:
        """Returns the number of units to remove; to be called for layers in order, heads before channels."""
        shape, (wanted, size) = self._shapes[index], self._wanted[index]
        if unit_type == "heads":
            self._owed += wanted
            self._owed_heads += shape.heads * wanted / size
            gone = max(0, min(shape.heads - 1, round(self._owed_heads), math.floor(self._owed / self._costs.head)))
            self._owed_heads -= gone
            self._owed -= gone * self._costs.head
            return gone
        sizes = chunk_sizes(shape.channels, self._multiple_of)
        gone = sum(sizes[: nearest(sizes, self._owed / self._costs.channel)])
        self._owed -= gone * self._costs.channel
        return gone


class _Reached(Exception):
    """Stops a block once the inputs of its projection are known."""


def _hessian(stream: BlockStream, index: int, unit_type: UnitType, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns X X^T over the inputs of a projection, (in, in) in float64."""
    projection: Any = stream.layers[index].get_submodule(_OUTPUTS[unit_type])
    size = projection.in_features
    total = torch.zeros(size, size, dtype=torch.float64, device=projection.weight.device)

    def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(0, 1).float()
        total.add_(x.T @ x)
        raise _Reached

    hook = projection.register_forward_pre_hook(add)
    try:
        for h in hidden:
            with suppress(_Reached):
                stream.run(index, h)
    finally:
        hook.remove()
    if not total.isfinite().all():
        raise ValueError(
            f"the inputs of {_OUTPUTS[unit_type]} in layer {index} are not finite in {hidden[0].dtype}: "
            "load the model with dtype=torch.bfloat16 or torch.float32"
        )
    return total


class _Surgeon:
    """One projection during pruning: its weight, (out, in), and the inverse of the damped Hessian, both in float64."""

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> None:
        self.weight = weight.double()
        diagonal = hessian.diagonal()
        mean = float(diagonal.mean()) + torch.finfo(torch.float32).tiny
        for factor_of_damping in (1, 10, 100):  # set by hand
            diagonal += factor_of_damping * damping * mean
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                break
        else:
            raise ValueError(f"a Hessian has no inverse even after adding {111 * damping:g} times its mean diagonal")
        self._inverse = torch.cholesky_inverse(factor)

    def errors(self, units: Sequence[int], width: int) -> torch.Tensor:
        """Returns the squared output error that the removal of each unit alone would leave, (units,)."""
        if width == 1:
            return self.weight[:, units].square().sum(0) / self._inverse.diagonal()[units]
        found = []
        for unit in units:
            own = slice(unit * width, (unit + 1) * width)
            solved = torch.linalg.solve(self._inverse[own, own], self.weight[:, own].T)
            found.append((self.weight[:, own].T * solved).sum())
        return torch.stack(found)

    def remove_units(self, n_units: int, n_gone: int, width: int) -> list[int]:
        """Removes the cheapest units, corrects the others and returns the units left, in rising order.

        Args:
            n_units: Number of units.
            n_gone: Number of units to remove: single columns in batches, groups of columns one by one.
            width: Columns per unit.
        """
        left = list(range(n_units))
        while (missing := n_gone - n_units + len(left)) > 0:
            batch = math.ceil(missing / _BATCH_SHARE) if width == 1 else 1
            order = self.errors(left, width).argsort(stable=True)
            gone = {left[i] for i in order[:batch].tolist()}
            self._remove([unit * width + i for unit in sorted(gone) for i in range(width)])
            left = [unit for unit in left if unit not in gone]
        return left

    def _remove(self, columns: list[int]) -> None:
        """Applies the OBS update for a group of columns: W -= W_g [(H^-1)_gg]^-1 (H^-1)_g:, and the same to H^-1."""
        rows = self._inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], rows)  # [(H^-1)_gg]^-1 (H^-1)_g:
        self.weight -= self.weight[:, columns] @ solved
        self._inverse -= rows.T @ solved
        self.weight[:, columns] = 0
