"""Optuna search spaces as the performance model sees them: a grid of ranks along the depth, and the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rankadaptor_optuna.surrogate.grid import Array, RankGrid

MAX_CANDIDATES = 64
MIN_LAYERS = 3
MAX_SERIES = 8
_NUMBER = re.compile(r"\d+")


def candidate_ranks(distribution: BaseDistribution) -> Array | None:
    """The integers that a distribution allows, increasing, at most 64 of a wide range; None where they are no ranks."""
    if isinstance(distribution, IntDistribution) and distribution.low >= 0:
        values = np.arange(distribution.low, distribution.high + 1, distribution.step, dtype=np.float64)
        if len(values) > MAX_CANDIDATES:
            spaced = np.geomspace if distribution.log else np.linspace
            values = values[np.unique(spaced(1, len(values), MAX_CANDIDATES).round().astype(int)) - 1]
        return values
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        if all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in choices):
            return np.asarray(sorted(choices), dtype=np.float64)  # type: ignore[type-var]
    return None


def rank_parameters(space: Mapping[str, BaseDistribution]) -> dict[str, int]:
    """Parameters that look like ranks along the depth, with the layer number that their name carries.

    Names that are alike but for one number, with ordered non-negative integers as values, in at least three layers:
    ``layer_3_rank``, ``r_3``, ``model.layers.3.mlp.r`` (any of them, also several such series side by side).
    """
    return {name: layer for name, (layer, _) in _rank_series(space).items()}


def _rank_series(space: Mapping[str, BaseDistribution]) -> dict[str, tuple[int, str]]:
    """Layer number of each rank parameter and what its name has in common with those of its series, in depth order."""
    readings: dict[str, list[tuple[str, int]]] = {}
    for name, distribution in space.items():
        if candidate_ranks(distribution) is not None:
            readings[name] = [(f"{name[: m.start()]}#{name[m.end() :]}", int(m[0])) for m in _NUMBER.finditer(name)]
    series = Counter(template for found in readings.values() for template, _ in found)
    layers = {}
    for name, found in readings.items():
        if found:
            template, layer = max(found, key=lambda reading: series[reading[0]])
            if series[template] >= MIN_LAYERS:
                layers[name] = layer, template
    return dict(sorted(layers.items(), key=lambda item: (item[1][0], item[0])))


class Encoding:
    """Splits a search space into ranks and ordinary parameters, and maps trials to and from numbers.

    Args:
        space: Distributions by name.
        grid: Grid of the rank parameters where a ``RankSpace`` gives it; else it is read off the names.
        rank_names: Names of the rank parameters in the grid's order, with ``grid``.
        sensitivity: The grid's, by name of the rank parameter; not heeded unless it has a number for each.

    Attributes:
        is_given: Whether the grid was given.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        grid: RankGrid | None = None,
        rank_names: list[str] | None = None,
        sensitivity: Mapping[str, float] | None = None,
    ) -> None:
        self.is_given = grid is not None
        if grid is None:
            found = _rank_series(space)
            rank_names, grid = list(found), _grid_of(space, found)
        self.rank_names = rank_names or []
        known = np.asarray([(sensitivity or {}).get(name, np.nan) for name in self.rank_names], dtype=np.float64)
        self.grid = replace(grid, sensitivity=known) if np.isfinite(known).all() else grid
        self.space = dict(space)
        self.ordinary_names = [name for name in space if name not in set(self.rank_names)]
        self.width = sum(_width(space[name]) for name in self.ordinary_names)

    def is_like(self, other: Encoding) -> bool:
        """Whether both encode the same parameters alike."""
        same = self.space == other.space and self.rank_names == other.rank_names
        return same and np.array_equal(self.grid.sensitivity, other.grid.sensitivity)

    def ranks(self, params: Mapping[str, Any]) -> list[float]:
        """Rank values of a trial in the grid's order, as they are: a changed range does not matter."""
        return [float(params[name]) for name in self.rank_names]

    def point(self, params: Mapping[str, Any]) -> list[float]:
        """The ordinary parameters of a trial in the unit cube."""
        return [x for name in self.ordinary_names for x in _to_unit(self.space[name], params[name])]

    def random_points(self, n: int, rng: np.random.Generator) -> Array:
        """Uniform points of the ordinary parameters, (n, width)."""
        columns = []
        for name in self.ordinary_names:
            distribution = self.space[name]
            if isinstance(distribution, CategoricalDistribution):
                columns.append(np.eye(len(distribution.choices))[rng.integers(len(distribution.choices), size=n)])
            else:
                columns.append(rng.random((n, 1)))
        return np.concatenate(columns, axis=1) if columns else np.zeros((n, 0))

    def near(self, point: Array, n: int, rng: np.random.Generator) -> Array:
        """Points close to a good one: numbers jittered, each category redrawn now and then, (n, width)."""
        fresh = self.random_points(n, rng)
        columns, start = [], 0
        for name in self.ordinary_names:
            width = _width(self.space[name])
            part = np.repeat(point[None, start : start + width], n, axis=0)
            if isinstance(self.space[name], CategoricalDistribution):
                redraw = rng.random((n, 1)) < 0.2
                columns.append(np.where(redraw, fresh[:, start : start + width], part))
            else:
                columns.append(np.clip(part + 0.1 * rng.standard_normal((n, 1)), 0, 1))
            start += width
        return np.concatenate(columns, axis=1)

    def decode(self, point: Array) -> dict[str, Any]:
        """Parameter values of a point in the unit cube."""
        params, start = {}, 0
        for name in self.ordinary_names:
            width = _width(self.space[name])
            params[name] = _from_unit(self.space[name], point[start : start + width])
            start += width
        return params


def _grid_of(space: Mapping[str, BaseDistribution], found: Mapping[str, tuple[int, str]]) -> RankGrid:
    values = [v for v in (candidate_ranks(space[name]) for name in found) if v is not None]
    layers, templates = [layer for layer, _ in found.values()], [template for _, template in found.values()]
    series = sorted(set(templates))
    few = len(series) <= MAX_SERIES  # more (one an expert, say) would be too many functions to learn
    return RankGrid(
        depth=np.asarray(layers, dtype=np.float64) / max(1, max(layers, default=0)),
        values=values,
        profile=np.zeros(len(values)),
        costs=np.ones(len(values)),
        reference=np.asarray([v[(len(v) - 1) // 2] for v in values]),  # a candidate, so that a trial can have it
        series=np.asarray([series.index(template) if few else 0 for template in templates], dtype=np.intp),
    )


def _width(distribution: BaseDistribution) -> int:
    return len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 1


def _bounds(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    """Ends of the unit interval; half a step is added, so that every grid value has an equal share."""
    low, high = float(distribution.low), float(distribution.high)
    if distribution.step is not None:
        low, high = low - distribution.step / 2, high + distribution.step / 2
    return (np.log(low), np.log(high)) if distribution.log else (low, high)


def _to_unit(distribution: BaseDistribution, value: Any) -> list[float]:  # noqa: ANN401
    if isinstance(distribution, CategoricalDistribution):
        one_hot = [0.0] * len(distribution.choices)
        if value in distribution.choices:  # a choice of an earlier range counts as none of these
            one_hot[int(distribution.to_internal_repr(value))] = 1.0
        return one_hot
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = _bounds(distribution)
    number = np.log(max(float(value), 1e-300)) if distribution.log else float(value)
    return [float(np.clip((number - low) / max(high - low, 1e-300), -1, 2))]


def _from_unit(distribution: BaseDistribution, unit: Array) -> Any:  # noqa: ANN401
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(np.argmax(unit))]
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = _bounds(distribution)
    number = low + float(unit[0]) * (high - low)
    number = float(np.exp(number)) if distribution.log else number
    if distribution.step is not None:
        steps = round((number - distribution.low) / distribution.step)
        number = distribution.low + steps * distribution.step
    number = min(max(number, distribution.low), distribution.high)
    return round(number) if isinstance(distribution, IntDistribution) else float(number)
