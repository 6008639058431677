"""What each pruning method decides: the tensors that change, the blocks that stay, and what each layer loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from rankadaptor_optuna.pruning.checkpoint import LayerProfile
from rankadaptor_optuna.pruning.gradients import Progress
from rankadaptor_optuna.pruning.hidden import coupled_size, hidden_importance, keep_hidden, select_hidden
from rankadaptor_optuna.pruning.importance import CRITERIA, Importance, Reduction, unit_importance
from rankadaptor_optuna.pruning.selection import Costs, select_kept
from rankadaptor_optuna.pruning.shortened import BLOCK_CRITERIA, block_importance, select_blocks
from rankadaptor_optuna.pruning.slimgpt import slimgpt
from rankadaptor_optuna.pruning.structure import (
    KINDS,
    Kind,
    keep_units,
    layer_shape,
    transformer_layers,
    unit_size,
    unit_tensors,
)

Ranking = Literal["global", "local"]
Structure = Literal["units", "hidden"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
Units = dict[Kind, dict[int, list[int]]]


@dataclass(frozen=True)
class Options:
    """What the methods can be told; see `prune`."""

    ratio: float
    window: range
    criterion: str
    reduction: Reduction = "sum"
    ranking: Ranking = "global"
    structure: Structure = "units"
    steps: int = 1
    multiple_of: int = 32
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True)
class Plan:
    """What a method decided.

    Attributes:
        cut: Tensors that differ from the dense model's, by name; on the CPU.
        profile: What each layer of the dense model loses.
        layers: The blocks that stay, in rising order.
    """

    cut: dict[str, torch.Tensor]
    profile: list[LayerProfile]
    layers: list[int]


@dataclass(frozen=True)
class Method:
    """Facts about a pruning method.

    Attributes:
        criteria: Importance criteria that it knows, its default first.
        n_samples: Calibration samples by default.
        sample_length: Tokens of each by default.
        keeps_ends: Whether some layers at either end stay whole by default.
    """

    criteria: tuple[str, ...]
    n_samples: int
    sample_length: int
    keeps_ends: bool = True


METHODS: dict[str, Method] = {
    "llm-pruner": Method(CRITERIA, 10, 128),
    "shortened": Method(BLOCK_CRITERIA, 10, 128),
    "slimgpt": Method(("obs",), 128, 256, keeps_ends=False),
}


def plan_pruning(method: str, model: PreTrainedModel, samples: torch.Tensor, options: Options) -> Plan:
    """Decides what a method of `METHODS` removes; the model stays as it is.

    Raises:
        ValueError: The ratio cannot be reached, or what is measured is not finite.
    """
    if method == "shortened":
        return _shortened(model, samples, options)
    if method == "slimgpt":
        return _slimgpt(model, samples, options)
    return (_llm_pruner_hidden if options.structure == "hidden" else _llm_pruner)(model, samples, options)


def _llm_pruner(model: PreTrainedModel, samples: torch.Tensor, options: Options) -> Plan:
    layers = transformer_layers(model)
    costs = Costs(
        head=unit_size(layers[0], "heads"),
        channel=unit_size(layers[0], "channels"),
        total=sum(size(layer) for layer in layers),
    )
    kept: Units = {
        kind: {index: list(range(getattr(layer_shape(layers[index]), kind))) for index in options.window}
        for kind in KINDS
    }
    first: Importance = {}
    for step in range(1, options.steps + 1):

        def report(done: int, total: int, before: int = step - 1) -> None:
            if options.progress is not None:
                options.progress(before * total + done, options.steps * total)

        with silenced(model, kept):
            importance = unit_importance(
                model,
                samples,
                options.window,
                criterion=options.criterion,  # type: ignore[arg-type]  # checked by prune
                reduction=options.reduction,
                seed=options.seed,
                progress=report,
            )
        first = first or importance
        for kind in KINDS:
            for index, values in importance[kind].items():
                gone = torch.ones(len(values), dtype=torch.bool)
                gone[kept[kind][index]] = False
                values = values.masked_fill(gone, -1)  # what went in an earlier step goes again
                importance[kind][index] = values
        heads, channels = select_kept(
            importance["heads"],
            importance["channels"],
            ratio=options.ratio * step / options.steps,
            costs=costs,
            multiple_of=options.multiple_of,
            local=options.ranking == "local",
        )
        kept = {"heads": heads, "channels": channels}
    return Plan(_cut_units(layers, kept), _unit_profile(layers, kept, first), list(range(len(layers))))


@contextmanager
def silenced(model: PreTrainedModel, kept: Units) -> Iterator[None]:
    """Lets a dense model compute what the pruned one would: the outputs of other units than `kept` are zeroed."""
    layers, saved = transformer_layers(model), []
    with torch.no_grad():
        for kind, by_layer in kept.items():
            for index, units in by_layer.items():
                n_units = getattr(layer_shape(layers[index]), kind)
                gone = sorted(set(range(n_units)) - set(units))
                if gone:
                    (weight,) = (p for name, p, dim in unit_tensors(layers[index], kind) if dim == 1)
                    saved.append((weight, weight.detach().clone()))
                    weight.view(weight.shape[0], n_units, -1)[:, gone] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)


def _llm_pruner_hidden(model: PreTrainedModel, samples: torch.Tensor, options: Options) -> Plan:
    importance = hidden_importance(
        model,
        samples,
        criterion=options.criterion,  # type: ignore[arg-type]  # checked by prune
        seed=options.seed,
        progress=options.progress,
    )
    layers = transformer_layers(model)
    share = coupled_size(layers[0]) / size(layers[0])
    kept = select_hidden(
        importance,
        ratio=options.ratio,
        share=share,
        heads=model.config.num_attention_heads,
        multiple_of=options.multiple_of,
    )
    removed = 1 - len(kept) / len(importance)
    lost = 1 - float(importance[kept].double().sum() / importance.double().sum().clamp(min=1e-30))
    profile = [LayerProfile(i, 0.0, 0.0, removed * share, lost) for i in range(len(layers))]
    return Plan(keep_hidden(model, kept), profile, list(range(len(layers))))


def _shortened(model: PreTrainedModel, samples: torch.Tensor, options: Options) -> Plan:
    importance = block_importance(
        model,
        samples,
        options.window,
        criterion=options.criterion,  # type: ignore[arg-type]  # checked by prune
        seed=options.seed,
        progress=options.progress,
    )
    n_layers = len(transformer_layers(model))
    kept = select_blocks(importance, ratio=options.ratio, n_layers=n_layers)
    profile = [LayerProfile(i, *([0.0] if i in kept else [1.0]) * 4) for i in range(n_layers)]
    return Plan({}, profile, kept)


def _slimgpt(model: PreTrainedModel, samples: torch.Tensor, options: Options) -> Plan:
    found = slimgpt(
        model,
        samples,
        options.window,
        ratio=options.ratio,
        multiple_of=options.multiple_of,
        progress=options.progress,
    )
    layers = transformer_layers(model)
    profile = _unit_profile(layers, found.kept, found.importance)
    return Plan(_cut_units(layers, found.kept) | found.weights, profile, list(range(len(layers))))


def _cut_units(layers: list[nn.Module], kept: Units) -> dict[str, torch.Tensor]:
    """In main memory: an accelerator need not hold a second model."""
    return {
        f"model.layers.{index}.{name}": tensor.cpu()
        for kind in KINDS
        for index, units in kept[kind].items()
        for name, tensor in keep_units(layers[index], kind, units).items()
    }


def _unit_profile(layers: list[nn.Module], kept: Units, importance: Importance) -> list[LayerProfile]:
    profile = []
    for index, layer in enumerate(layers):
        if index not in kept["heads"]:
            profile.append(LayerProfile(index, 0.0, 0.0, 0.0, 0.0))
            continue
        gone = {kind: getattr(layer_shape(layer), kind) - len(kept[kind][index]) for kind in KINDS}
        before = sum(float(importance[kind][index].double().sum()) for kind in KINDS)
        after = sum(float(importance[kind][index][kept[kind][index]].double().sum()) for kind in KINDS)
        profile.append(
            LayerProfile(
                layer=index,
                heads_removed=gone["heads"] / layer_shape(layer).heads,
                channels_removed=gone["channels"] / layer_shape(layer).channels,
                parameters_removed=sum(n * unit_size(layer, kind) for kind, n in gone.items()) / size(layer),
                importance_removed=1 - after / before if before > 0 else 0.0,
            )
        )
    return profile


def size(module: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
