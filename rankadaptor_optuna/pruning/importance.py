"""Importance of heads and MLP channels: LLM-Pruner's criteria and group reductions (arXiv 2305.11627)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rankadaptor_optuna.pruning.config import Criterion, Reduction
from rankadaptor_optuna.pruning.gradients import Gradient, Gradients, Progress, evaluation_mode
from rankadaptor_optuna.pruning.streaming import BlockStream
from rankadaptor_optuna.pruning.structure import (
    PROJECTIONS,
    UNIT_TYPES,
    UnitType,
    layer_shape,
    transformer_layers,
    unit_sums,
    unit_tensors,
)

Importance = dict[UnitType, dict[int, torch.Tensor]]

# Importance of each entry of a weight: LLM-Pruner, section 3.2; equation 2 of the RankAdaptor paper.
_TAYLOR: dict[str, Callable[[torch.Tensor, Gradient], torch.Tensor]] = {
    "param_first": lambda w, g: (w * g.mean).abs(),
    "param_second": lambda w, g: (w.square() * g.mean_square).abs(),
    "param_mix": lambda w, g: (w * g.mean - w.square() * g.mean_square / 2).abs(),
}
_MAGNITUDE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"l1": torch.abs, "l2": torch.square}
# (projections, units) -> (units,)
_REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
    "first": lambda scores: scores[0],
}


def needs_gradients(criterion: str) -> bool:
    """Returns whether a criterion is measured on calibration samples."""
    return criterion in _TAYLOR


def parameter_importance(criterion: str, weight: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
    """Scores each entry of a weight, in float32.

    Args:
        criterion: Any `Criterion` but `"random"`.
        weight: Any shape.
        gradient: Gradient of the calibration loss; None for a criterion without gradients.

    Returns:
        Importance, of the weight's shape.
    """
    weight = weight.detach().float()
    if gradient is None:
        return _MAGNITUDE[criterion](weight)
    return _TAYLOR[criterion](weight, gradient)


def unit_importance(
    model: nn.Module,
    samples: torch.Tensor,
    layers: Sequence[int],
    *,
    criterion: Criterion = "param_first",
    reduction: Reduction = "sum",
    seed: int = 0,
    progress: Progress | None = None,
) -> Importance:
    """Scores every head and channel of some layers by the expected damage of its removal.

    With g_i the gradient of sample i's mean next-token loss and g their mean, the importance of a parameter w is
    (criteria as LLM-Pruner names them; equation 2 of the RankAdaptor paper is `"param_mix"`):

    * `"param_first"`: |w g|, the first-order Taylor term;
    * `"param_second"`: |w^2 mean(g_i^2)|, the second-order term with the diagonal of the Fisher matrix as Hessian;
    * `"param_mix"`: |w g - w^2 mean(g_i^2) / 2|, both;
    * `"l1"`, `"l2"`: |w|, w^2, without samples;
    * `"random"`: a random number for each unit.

    The importances of a unit's parameters are summed within each projection, then reduced over the projections: by
    their sum, mean, maximum or product, or by `"first"`, which takes the root of LLM-Pruner's dependency graph alone
    (k_proj, gate_proj). LLM-Pruner reduces row by row and then sums the rows of a head. Here the rows of a head are
    summed first, because with grouped-query attention query and key rows do not pair up; sum and mean are the same
    either way.

    The model runs block by block: its device holds one block's gradients beside the model, in float32.

    Args:
        model: A LLaMA-like causal language model. Its gradients and flags are not changed.
        samples: Token ids, (samples, tokens).
        layers: Indices of the layers to score.
        criterion: One of the criteria above.
        reduction: One of the reductions above.
        seed: Seed of `"random"`.
        progress: Called with (blocks done, blocks in all).

    Returns:
        For each unit type, by layer: a float32 tensor on the CPU of shape (units,).

    Raises:
        ValueError: A token id is outside the model's vocabulary, or a gradient is not finite.
    """
    blocks = transformer_layers(model)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            unit_type: {i: torch.rand(layer_shape(blocks[i]).count(unit_type), generator=generator) for i in layers}
            for unit_type in UNIT_TYPES
        }
    importance: Importance = {unit_type: {} for unit_type in UNIT_TYPES}

    def score(layer: int, gradients: dict[str, Gradient] | None) -> None:
        for unit_type in UNIT_TYPES:
            importance[unit_type][layer] = _reduced(blocks[layer], unit_type, criterion, reduction, gradients)

    if not needs_gradients(criterion):
        for layer in layers:
            score(layer, None)
        return importance
    wanted = {
        layer: [name for unit_type in UNIT_TYPES for name, _, _ in unit_tensors(blocks[layer], unit_type)]
        for layer in layers
    }
    with evaluation_mode(model):
        gradients = Gradients(BlockStream(model, samples), squares=criterion != "param_first", progress=progress)
        gradients.walk(wanted, score)
    return importance


def _reduced(
    block: nn.Module, unit_type: UnitType, criterion: str, reduction: str, gradients: dict[str, Gradient] | None
) -> torch.Tensor:
    n_units = layer_shape(block).count(unit_type)
    by_projection = {name: torch.zeros(n_units, dtype=torch.float64) for name in PROJECTIONS[unit_type]}
    for name, tensor, dim in unit_tensors(block, unit_type):
        scores = parameter_importance(criterion, tensor, None if gradients is None else gradients[name])
        by_projection[name.rpartition(".")[0]] += unit_sums(scores, dim, n_units).double().cpu()
    return _REDUCE[reduction](torch.stack(list(by_projection.values()))).float()
