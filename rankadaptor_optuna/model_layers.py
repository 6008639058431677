"""Reads a model's layers: which modules can have a rank, what a rank costs there, and what pruning removed.

Needs no torch: linear modules are recognised by their ``in_features``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rankadaptor_optuna.ranks import Module

Granularity = Literal["layer", "sublayer"]
SUBLAYERS = ("self_attn", "mlp")  # the two parts of a layer, as transformers names their modules
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(\w+)")


def modules_of(layers: Iterable[int], granularity: Granularity) -> tuple[Module, ...]:
    """Returns the modules with a rank of their own in some layers: the layers, or two sublayers of each."""
    if granularity == "layer":
        return tuple(layers)
    return tuple(f"{layer}.{sublayer}" for layer in layers for sublayer in SUBLAYERS)


def module_of(name: str, granularity: Granularity) -> Module | None:
    """Returns the module that a model's submodule belongs to, by its dotted name; None outside the layers."""
    match = _LAYER.search(name)
    if match is None:
        return None
    return int(match[1]) if granularity == "layer" else f"{match[1]}.{match[2]}"


def layer_of(module: Module) -> int:
    """Returns the index of the layer that a module is or belongs to."""
    return int(str(module).partition(".")[0])


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model, as far as they can be adapted.

    Attributes:
        layers: Indices of the layers with linear modules to adapt, increasing.
        costs: Trainable parameters per rank of each module.
        removed: Share of each module's linear weights that pruning removed, relative to the largest layer (or the
            largest sublayer of its kind), in [0, 1).
    """

    layers: list[int]
    costs: dict[Module, int]
    removed: dict[Module, float]


def read_layers(model: Any, targets: Iterable[str] | None, granularity: Granularity) -> ModelLayers:  # noqa: ANN401
    """Reads the layers of a model, ``...layers.<i>...``.

    Args:
        model: A ``torch.nn.Module``.
        targets: Last path components of the adapted modules. Default: every linear module of a layer.
        granularity: Whether layers or sublayers have ranks.

    Raises:
        ValueError: No layer has linear modules of these names, or, by sublayers, a layer has none in one of them or
            some outside both.
    """
    wanted = None if targets is None else set(targets)
    costs: dict[Module, int] = {}
    weights: dict[Module, int] = {}
    for name, linear in model.named_modules():
        module = module_of(name, granularity)
        if module is None or not hasattr(linear, "in_features"):
            continue
        weights[module] = weights.get(module, 0) + linear.in_features * linear.out_features
        if wanted is None or name.rpartition(".")[2] in wanted:
            costs[module] = costs.get(module, 0) + linear.in_features + linear.out_features
    if not costs:
        names = "linear modules" if wanted is None else f"modules named {sorted(wanted)}"
        raise ValueError(f"{type(model).__name__} has no {names} below 'layers.<i>.'; nothing to adapt.")
    layers = sorted({layer_of(module) for module in costs})
    odd = costs.keys() ^ set(modules_of(layers, granularity))
    if odd:
        shown = [str(module) for module in sorted(odd, key=lambda module: (layer_of(module), str(module)))[:3]]
        raise ValueError(
            f"each layer needs modules to adapt in {' and '.join(SUBLAYERS)} and nowhere else, which is not so for "
            f"{shown}; adapt others, or use granularity='layer'."
        )
    largest: dict[str, int] = {}
    for module, n in weights.items():
        largest[_kind_of(module)] = max(n, largest.get(_kind_of(module), 0))
    removed = {module: 1 - weights[module] / largest[_kind_of(module)] for module in costs}
    return ModelLayers(layers, costs, removed)


def _kind_of(module: Module) -> str:
    """Returns the sublayer's name; empty for a layer."""
    return str(module).partition(".")[2]
