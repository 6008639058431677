"""Pruning methods: each decides which tensors change, which blocks stay, and what each layer loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rankadaptor_optuna.pruning.blocks import block_list
from rankadaptor_optuna.pruning.checkpoint import LayerProfile
from rankadaptor_optuna.pruning.gradients import Progress
from rankadaptor_optuna.pruning.hidden import coupled_size, hidden_importance, keep_hidden, select_hidden
from rankadaptor_optuna.pruning.importance import Importance, unit_importance
from rankadaptor_optuna.pruning.selection import Costs, check_reachable, largest_removable, select_kept
from rankadaptor_optuna.pruning.shortened import block_importance, n_removed, select_blocks
from rankadaptor_optuna.pruning.slimgpt import slimgpt
from rankadaptor_optuna.pruning.structure import (
    UNIT_TYPES,
    UnitType,
    keep_units,
    layer_shape,
    transformer_layers,
    unit_size,
    unit_tensors,
)

Settings = Mapping[str, Any]  # of `PruningConfig.resolved`
Units = dict[UnitType, dict[int, list[int]]]


@dataclass(frozen=True)
class Plan:
    """Decision of a pruning method.

    Attributes:
        cut: Tensors that differ from the dense model's, by name; on the CPU.
        profile: What each layer of the dense model loses.
        layers: The blocks that stay, in rising order.
    """

    cut: dict[str, torch.Tensor]
    profile: list[LayerProfile]
    layers: list[int]


def _prune_units(model: PreTrainedModel, samples: torch.Tensor, settings: Settings, progress: Progress | None) -> Plan:
    """LLM-Pruner: removes the heads and MLP channels of least importance, in one or more steps."""
    layers, prunable = transformer_layers(model), _prunable(model, settings)
    costs = Costs(
        head=unit_size(layers[0], "heads"),
        channel=unit_size(layers[0], "channels"),
        total=sum(size(layer) for layer in layers),
    )
    removable = (largest_removable(layer_shape(layers[i]), costs, settings["multiple_of"]) for i in prunable)
    check_reachable(settings["ratio"], sum(removable), costs, len(prunable))  # before the calibration
    kept: Units = {
        unit_type: {index: list(range(layer_shape(layers[index]).count(unit_type))) for index in prunable}
        for unit_type in UNIT_TYPES
    }
    first: Importance = {}
    for step in range(1, settings["steps"] + 1):

        def report(done: int, total: int, before: int = step - 1) -> None:
            if progress is not None:
                progress(before * total + done, settings["steps"] * total)

        with silenced(model, kept):
            importance = unit_importance(
                model,
                samples,
                prunable,
                criterion=settings["criterion"],
                reduction=settings["reduction"],
                seed=settings["seed"],
                progress=report,
            )
        first = first or importance
        for unit_type in UNIT_TYPES:
            for index, values in importance[unit_type].items():
                gone = torch.ones(len(values), dtype=torch.bool)
                gone[kept[unit_type][index]] = False
                # real importances are not negative, so units of earlier steps are removed first again
                importance[unit_type][index] = values.masked_fill(gone, -1)
        heads, channels = select_kept(
            importance["heads"],
            importance["channels"],
            ratio=settings["ratio"] * step / settings["steps"],
            costs=costs,
            multiple_of=settings["multiple_of"],
            local=settings["ranking"] == "local",
        )
        kept = {"heads": heads, "channels": channels}
    return Plan(_cut_units(layers, kept), _unit_profile(layers, kept, first), list(range(len(layers))))


@contextmanager
def silenced(model: PreTrainedModel, kept: Units) -> Iterator[None]:
    """Makes a dense model compute the pruned one's output: zeroes the output weights of all units but `kept`."""
    layers, saved = transformer_layers(model), []
    with torch.no_grad():
        for unit_type, by_layer in kept.items():
            for index, units in by_layer.items():
                n_units = layer_shape(layers[index]).count(unit_type)
                gone = sorted(set(range(n_units)) - set(units))
                if gone:
                    (weight,) = (p for name, p, dim in unit_tensors(layers[index], unit_type) if dim == 1)
                    saved.append((weight, weight.detach().clone()))
                    weight.view(weight.shape[0], n_units, -1)[:, gone] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)


def _prune_hidden(model: PreTrainedModel, samples: torch.Tensor, settings: Settings, progress: Progress | None) -> Plan:
    """LLM-Pruner's channel mode: makes the hidden size smaller through the whole model."""
    layers = transformer_layers(model)
    share = coupled_size(layers[0]) / size(layers[0])
    select = partial(
        select_hidden,
        ratio=settings["ratio"],
        share=share,
        heads=model.config.num_attention_heads,
        multiple_of=settings["multiple_of"],
    )
    select(torch.zeros(model.config.hidden_size))  # refuses the ratio before the calibration
    importance = hidden_importance(
        model, samples, criterion=settings["criterion"], seed=settings["seed"], progress=progress
    )
    kept = select(importance)
    removed = 1 - len(kept) / len(importance)
    lost = 1 - float(importance[kept].double().sum() / importance.double().sum().clamp(min=1e-30))
    profile = [LayerProfile(i, 0.0, 0.0, removed * share, lost) for i in range(len(layers))]
    return Plan(keep_hidden(model, kept), profile, list(range(len(layers))))


def _llm_pruner(model: PreTrainedModel, samples: torch.Tensor, settings: Settings, progress: Progress | None) -> Plan:
    return (_prune_hidden if settings["structure"] == "hidden" else _prune_units)(model, samples, settings, progress)


def _shortened(model: PreTrainedModel, samples: torch.Tensor, settings: Settings, progress: Progress | None) -> Plan:
    n_layers, prunable = len(block_list(model)[1]), _prunable(model, settings)
    n_removed(settings["ratio"], n_layers, len(prunable))  # refuses the ratio before the calibration
    importance = block_importance(
        model,
        samples,
        prunable,
        criterion=settings["criterion"],
        seed=settings["seed"],
        progress=progress,
    )
    kept = select_blocks(importance, ratio=settings["ratio"], n_layers=n_layers)
    profile = [LayerProfile(i, *([0.0] if i in kept else [1.0]) * 4) for i in range(n_layers)]
    return Plan({}, profile, kept)


def _slimgpt(model: PreTrainedModel, samples: torch.Tensor, settings: Settings, progress: Progress | None) -> Plan:
    found = slimgpt(
        model,
        samples,
        _prunable(model, settings),
        ratio=settings["ratio"],
        multiple_of=settings["multiple_of"],
        progress=progress,
    )
    layers = transformer_layers(model)
    profile = _unit_profile(layers, found.kept, found.importance)
    return Plan(_cut_units(layers, found.kept) | found.weights, profile, list(range(len(layers))))


# By name, as in `config.PRUNING_METHODS`: (model, calibration samples, settings, progress) -> plan. A planner leaves
# the model unchanged and raises ValueError if the ratio cannot be reached or a measurement is not finite.
PLANNERS: dict[str, Callable[[PreTrainedModel, torch.Tensor, Settings, Progress | None], Plan]] = {
    "llm-pruner": _llm_pruner,
    "shortened": _shortened,
    "slimgpt": _slimgpt,
}


def _prunable(model: PreTrainedModel, settings: Settings) -> range:
    """Returns the layers that may be pruned."""
    return range(settings["keep_first"], len(block_list(model)[1]) - settings["keep_last"])


def _cut_units(layers: list[nn.Module], kept: Units) -> dict[str, torch.Tensor]:
    """Returns the smaller tensors by name, in main memory, so that no accelerator holds a second model."""
    return {
        f"model.layers.{index}.{name}": tensor.cpu()
        for unit_type in UNIT_TYPES
        for index, units in kept[unit_type].items()
        for name, tensor in keep_units(layers[index], unit_type, units).items()
    }


def _unit_profile(layers: list[nn.Module], kept: Units, importance: Importance) -> list[LayerProfile]:
    profile = []
    for index, layer in enumerate(layers):
        if index not in kept["heads"]:
            profile.append(LayerProfile(index, 0.0, 0.0, 0.0, 0.0))
            continue
        shape = layer_shape(layer)
        gone = {unit_type: shape.count(unit_type) - len(kept[unit_type][index]) for unit_type in UNIT_TYPES}
        before = sum(float(importance[unit_type][index].double().sum()) for unit_type in UNIT_TYPES)
        after = sum(
            float(importance[unit_type][index][kept[unit_type][index]].double().sum()) for unit_type in UNIT_TYPES
        )
        profile.append(
            LayerProfile(
                layer=index,
                heads_removed=gone["heads"] / shape.heads,
                channels_removed=gone["channels"] / shape.channels,
                parameters_removed=sum(n * unit_size(layer, unit_type) for unit_type, n in gone.items()) / size(layer),
                importance_removed=1 - after / before if before > 0 else 0.0,
            )
        )
    return profile


def size(module: nn.Module) -> int:
    """Returns the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
