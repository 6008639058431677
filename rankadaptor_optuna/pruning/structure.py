"""The prunable units of a LLaMA-like model: their parameters, their size, and how to keep some of them.

A unit is a group of parameters that must be removed together (the coupled structure of LLM-Pruner, equation 1 of the
RankAdaptor paper):

* a head: one key-value head with all of its query heads (rows of q, k and v; columns of o),
* a channel: one MLP channel (a row of gate and of up; a column of down),

with the bias entries of those rows. Unit `i` of `n` owns the `i`-th of `n` equal slices of each projection. With
grouped-query attention, this slice of q holds exactly the query heads that attend to key-value head `i`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

UnitType = Literal["heads", "channels"]

# By unit type: each projection and the dimension of its weight along which the units lie. The root of LLM-Pruner's
# dependency graph comes first (reduction "first" uses it alone).
PROJECTIONS: dict[UnitType, dict[str, int]] = {
    "heads": {"self_attn.k_proj": 0, "self_attn.q_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1},
    "channels": {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1},
}
UNIT_TYPES: tuple[UnitType, ...] = ("heads", "channels")
PROJECTION_NAMES = tuple(name for names in PROJECTIONS.values() for name in names)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # model types whose units can be removed
_LOOKED_FOR = "model.layers[i].self_attn.{q,k,v,o}_proj and model.layers[i].mlp.{gate,up,down}_proj"


@dataclass(frozen=True)
class LayerShape:
    """Number of units of a layer, by type.

    Attributes:
        heads: Key-value heads, each with its query heads.
        channels: MLP channels (the intermediate size).
    """

    heads: int
    channels: int

    def count(self, unit_type: UnitType) -> int:
        """Returns the number of units of a type."""
        return self.heads if unit_type == "heads" else self.channels


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """Finds the transformer blocks of a LLaMA-like model.

    Args:
        model: A causal language model with LLaMA's module names (Llama, Mistral, Qwen2, Qwen3).

    Returns:
        The blocks, first to last.

    Raises:
        ValueError: A module is missing, or a projection is not a plain `nn.Linear` (quantised or adapted).
    """

    def complain(path: str, found: str) -> ValueError:
        return ValueError(
            f"cannot prune {type(model).__name__}: looked for {_LOOKED_FOR}, but {path} is {found}; "
            "pass an unquantised Llama-, Mistral-, Qwen2- or Qwen3-like causal model, or use method 'shortened'"
        )

    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise complain("model.layers", "missing")
    for index, layer in enumerate(layers):
        for name in PROJECTION_NAMES:
            module: object = layer
            for part in name.split("."):
                module = getattr(module, part, None)
            if type(module) is not nn.Linear:
                found = "missing" if module is None else f"a {type(module).__name__}"
                raise complain(f"model.layers[{index}].{name}", found)
    return list(layers)


def has_units(model: nn.Module) -> bool:
    """Returns whether heads and channels of a model can be removed: a Llama, Mistral, Qwen2 or Qwen3 model."""
    return getattr(getattr(model, "config", None), "model_type", None) in FAMILIES


def layer_shape(layer: nn.Module) -> LayerShape:
    """Counts the units of a block by the shapes of its weights."""
    attention = layer.get_submodule("self_attn")
    return LayerShape(
        heads=layer.get_parameter("self_attn.k_proj.weight").shape[0] // int(attention.head_dim),  # type: ignore[arg-type]
        channels=layer.get_parameter("mlp.gate_proj.weight").shape[0],
    )


def unit_tensors(layer: nn.Module, unit_type: UnitType) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yields the parameters that consist of units of a type.

    Args:
        layer: A transformer block.
        unit_type: `"heads"` or `"channels"`.

    Yields:
        (name within the block, parameter, dimension along which the units lie). The biases of the two output
        projections belong to no unit and are left out.
    """
    for name, dim in PROJECTIONS[unit_type].items():
        yield f"{name}.weight", layer.get_parameter(f"{name}.weight"), dim
        if dim == 0 and layer.get_submodule(name).bias is not None:
            yield f"{name}.bias", layer.get_parameter(f"{name}.bias"), 0


def unit_size(layer: nn.Module, unit_type: UnitType) -> int:
    """Returns the number of parameters in one unit of a type."""
    n_units = layer_shape(layer).count(unit_type)
    return sum(tensor.numel() for _, tensor, _ in unit_tensors(layer, unit_type)) // n_units


def unit_sums(values: torch.Tensor, dim: int, n_units: int) -> torch.Tensor:
    """Sums the entries of a projection's weight or bias over each unit.

    Args:
        values: Shape (out, in) or (out,).
        dim: The dimension along which the units lie.
        n_units: Number of units.

    Returns:
        Shape (n_units,).
    """
    return values.movedim(dim, 0).reshape(n_units, -1).sum(1)


def keep_units(layer: nn.Module, unit_type: UnitType, kept: list[int]) -> dict[str, torch.Tensor]:
    """Cuts a block's parameters down to some of its units.

    Args:
        layer: A transformer block; it is not changed.
        unit_type: `"heads"` or `"channels"`.
        kept: The units to keep, in rising order.

    Returns:
        New tensors by their name within the block.
    """
    n_units = layer_shape(layer).count(unit_type)
    cut = {}
    for name, tensor, dim in unit_tensors(layer, unit_type):
        index = torch.arange(tensor.shape[dim], device=tensor.device).view(n_units, -1)[kept].flatten()
        cut[name] = tensor.detach().index_select(dim, index)
    return cut
