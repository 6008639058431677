"""Reads a model's layers: which modules can have a rank, the cost of a rank there, and the share that pruning removed.

Needs no torch: linear modules are recognised by their features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rankadaptor_optuna.llm.adaptable import Linears, adaptable_linears, designed_model, features
from rankadaptor_optuna.ranks import TARGETS, Module

Granularity = Literal["layer", "sublayer"]
SUBLAYERS = ("self_attn", "mlp")  # the two parts of a layer, as transformers names their modules
_MOST_NAMED = 12


def modules_of(layers: Iterable[int], granularity: Granularity) -> tuple[Module, ...]:
    """Returns the modules with a rank of their own in some layers: the layers, or two sublayers of each."""
    if granularity == "layer":
        return tuple(layers)
    return tuple(f"{layer}.{sublayer}" for layer in layers for sublayer in SUBLAYERS)


def module_of(name: str, granularity: Granularity, path: str = "layers") -> Module | None:
    """Returns the module that a model's submodule belongs to; None outside the layers.

    Args:
        name: Dotted name of the submodule, in the model or in a PEFT model of it.
        granularity: Whether layers or sublayers have ranks.
        path: Dotted name of the list of layers, or its end.
    """
    match = re.search(rf"(?:^|\.){re.escape(path)}\.(\d+)\.(\w+)", name)
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
        modules: The linear modules to adapt, by dotted name, with the layer or sublayer that each belongs to.
        targets: Names of these modules for ``LoraSettings``: last path components, or ``PATH.*.NAME`` with ``*`` for
            the layer's index where these would match other modules too.
        layers: Indices of the layers with linear modules to adapt, increasing.
        costs: Trainable parameters per rank of each module with a rank.
        removed: Share of the linear weights that pruning removed from each module with a rank, relative to the largest
            layer (or the largest sublayer of its kind), in [0, 1); None where layers differ and the model's
            configuration does not tell by how much they differed before.
        notes: Sentences about modules that get no adapter.
    """

    modules: dict[str, Module]
    targets: tuple[str, ...]
    layers: list[int]
    costs: dict[Module, int]
    removed: dict[Module, float] | None
    notes: tuple[str, ...]


def read_layers(model: Any, targets: Iterable[str] | None, granularity: Granularity) -> ModelLayers:  # noqa: ANN401
    """Reads the layers of a model: the numbered list of blocks of its text decoder.

    Args:
        model: A ``torch.nn.Module``.
        targets: Names of the adapted modules (ends of their dotted names, or as in ``ModelLayers.targets``). LLaMA's
            seven names, the default of recipes, stand for every linear module of a layer where one of them is missing.
            Default, and PEFT's ``"all-linear"``: every linear module of a layer.
        granularity: Whether layers or sublayers have ranks.

    Raises:
        ValueError: The model cannot be adapted, a name fits no linear module of a layer, or, by sublayers, a layer has
            none in one of them or some outside both.
    """
    if isinstance(targets, str):
        targets = None if targets == "all-linear" else (targets,)
    found = adaptable_linears(model)
    wanted, notes = _selected(model, found, None if targets is None else tuple(targets))
    modules: dict[str, Module] = {}
    costs: dict[Module, int] = {}
    for name in wanted:
        module = module_of(name, granularity, found.path)
        assert module is not None  # adaptable modules are inside the layers
        modules[name] = module
        costs[module] = costs.get(module, 0) + sum(found.features[name])
    layers = sorted({layer_of(module) for module in costs})
    odd = costs.keys() ^ set(modules_of(layers, granularity))
    if odd:
        shown = [str(module) for module in sorted(odd, key=lambda module: (layer_of(module), str(module)))[:3]]
        raise ValueError(
            f"each layer needs modules to adapt in {' and '.join(SUBLAYERS)} and nowhere else, which is not so for "
            f"{shown}; adapt others, or use granularity='layer'."
        )
    removed = _removed(model, found.path, granularity, costs)
    names = _names(model, found.path, modules)
    return ModelLayers(modules, names, layers, costs, removed, (*found.notes, *notes))


def _selected(
    model: Any,  # noqa: ANN401
    found: Linears,
    targets: tuple[str, ...] | None,
) -> tuple[list[str], list[str]]:
    """Returns the names of the modules to adapt, and notes."""
    if targets is None:
        return list(found.features), []
    if not targets:
        raise ValueError("targets must name at least one module, got none; leave it out to adapt all linear modules.")
    chosen = {target: [name for name in found.features if _matches(name, target)] for target in targets}
    missing = [target for target, names in chosen.items() if not names]
    there = list(dict.fromkeys(name.rpartition(".")[2] for name in found.features))
    shown = ", ".join(there[:_MOST_NAMED])
    if missing and targets == TARGETS:
        note = f"it has no {', '.join(missing)} to adapt; all its linear modules have adapters instead: {shown}"
        return list(found.features), [note]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no modules named {missing} to adapt below '{found.path}.<i>.'; "
            f"there are {shown}."
        )
    named = {name for names in chosen.values() for name in names}
    return [name for name in found.features if name in named], []


def _matches(name: str, target: str) -> bool:
    if "*" in target:
        return re.fullmatch(re.escape(target).replace(r"\*", r"\d+"), name) is not None
    return name == target or name.endswith(f".{target}")


def _names(model: Any, path: str, modules: Mapping[str, Module]) -> tuple[str, ...]:  # noqa: ANN401
    """Returns the shortest names that match exactly these modules.

    Raises:
        ValueError: A module has an adapter in some layers, and a module of the same name has none in others.
    """
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    everything = {name for name, _ in model.named_modules()}
    matched = {name for name in everything if any(_matches(name, target) for target in short)}
    if path.split(".")[-1] == "layers" and path.split(".").count("layers") == 1 and matched == modules.keys():
        return short
    prefix = len(path) + 1
    long = tuple(dict.fromkeys(f"{path}.*.{name[prefix:].partition('.')[2]}" for name in modules))
    matched = {name for name in everything if any(_matches(name, target) for target in long)}
    if matched != modules.keys():
        odd = sorted(matched - modules.keys())[0]
        raise ValueError(f"{odd} cannot be adapted while modules of its name in other layers are; name other targets.")
    return long


def _removed(
    model: Any,  # noqa: ANN401
    path: str,
    granularity: Granularity,
    costs: Iterable[Module],
) -> dict[Module, float] | None:
    weights = _linear_weights(model, path, granularity)
    kinds = {module: str(module).partition(".")[2] for module in weights}  # the sublayer's name; empty for a layer
    shares: Mapping[Module, float] = weights
    if len({(kinds[module], n) for module, n in weights.items()}) > len(set(kinds.values())):
        dense = designed_model(model)
        if dense is not None:
            designed = _linear_weights(dense, path, granularity)
            shares = {module: n / designed.get(module, n) for module, n in weights.items()}
        elif len({frozenset(_linears_of(model, path, layer)) for layer in {layer_of(m) for m in weights}}) > 1:
            return None
    largest: dict[str, float] = {}
    for module, share in shares.items():
        largest[kinds[module]] = max(share, largest.get(kinds[module], 0))
    return {module: 1 - shares[module] / largest[kinds[module]] for module in costs}


def _linear_weights(model: Any, path: str, granularity: Granularity) -> dict[Module, int]:  # noqa: ANN401
    """Returns the number of linear weights of each layer or sublayer."""
    weights: dict[Module, int] = {}
    for name, linear in model.named_modules(remove_duplicate=False):  # a shared module belongs to each of its layers
        if not name.startswith(f"{path}.") or (size := features(linear)) is None:
            continue
        if (module := module_of(name, granularity, path)) is not None:
            weights[module] = weights.get(module, 0) + size[0] * size[1]
    return weights


def _linears_of(model: Any, path: str, layer: int) -> list[str]:  # noqa: ANN401
    """Returns the names of the linear modules within a layer."""
    prefix = f"{path}.{layer}."
    return [n.removeprefix(prefix) for n, m in model.named_modules() if n.startswith(prefix) and features(m)]
