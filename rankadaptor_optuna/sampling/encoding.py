"""Search spaces as the performance model sees them: a grid of ranks along the depth, and the ordinary parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rankadaptor_optuna.sampling.rank_parameters import Templates, candidate_ranks, middle_candidate, rank_parameters
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.surrogate.grid import Array, RankGrid

MAX_SERIES = 8  # series with functions of depth of their own; more (one per expert) are too many to learn; set by hand
_JITTER = 0.1  # standard deviation of numbers near a good point, in the unit cube; set by hand
_REDRAWN = 0.2  # share of categories redrawn near a good point; set by hand


class Encoding:
    """Splits a search space into ranks and ordinary parameters, and maps both to numbers and back.

    Args:
        distributions: The search space, by parameter name.
        rank_space: The rank space. Default: ranks are recognised by their names, see ``rank_parameters``.
        sensitivity: Sensitivity of the loss to each layer's adapter, by rank parameter; ignored unless complete.
        declared: Templates of the rank parameters' names where there is no space, see ``rank_parameters``.

    Attributes:
        distributions: The search space.
        grid: The rank parameters as arrays.
        rank_names: Names of the rank parameters in the grid's order.
        ordinary_names: Names of the ordinary parameters.
        width: Width of the ordinary parameters' points, E: one for a number, one per choice for a category.
        has_space: Whether the ranks are those of a rank space.
    """

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        rank_space: RankSpace | None = None,
        sensitivity: Mapping[str, float] | None = None,
        declared: Templates | None = None,
    ) -> None:
        self.has_space = rank_space is not None
        if rank_space is None:
            series = rank_parameters(distributions, declared)
            self.rank_names, grid = list(series), _grid_of(distributions, series)
        else:
            self.rank_names, grid = list(rank_space.names), RankGrid.from_space(rank_space)
        known = np.asarray([(sensitivity or {}).get(name, np.nan) for name in self.rank_names], dtype=np.float64)
        self.grid = replace(grid, sensitivity=known) if np.isfinite(known).all() else grid
        self.distributions = dict(distributions)
        self.ordinary_names = [name for name in distributions if name not in set(self.rank_names)]
        self.width = sum(_width(distributions[name]) for name in self.ordinary_names)

    def is_like(self, other: Encoding) -> bool:
        """Returns whether both encode the same parameters to the same numbers."""
        same = self.distributions == other.distributions and self.rank_names == other.rank_names
        return same and np.array_equal(self.grid.sensitivity, other.grid.sensitivity)

    def ranks(self, params: Mapping[str, Any]) -> list[float]:
        """Returns a trial's ranks in the grid's order, (L,), also where they are no candidates (any longer)."""
        return [float(params[name]) for name in self.rank_names]

    def point(self, params: Mapping[str, Any]) -> list[float]:
        """Returns a trial's ordinary parameters in the unit cube, (E,)."""
        return [x for name in self.ordinary_names for x in _to_unit(self.distributions[name], params[name])]

    def rank_params(self, ranks: Iterable[float]) -> dict[str, int]:
        """Returns ranks in the grid's order, (L,), as parameters."""
        return {name: int(rank) for name, rank in zip(self.rank_names, ranks, strict=True)}

    def ordinary_params(self, point: Array) -> dict[str, Any]:
        """Returns a point in the unit cube, (E,), as ordinary parameters."""
        return {name: _from_unit(self.distributions[name], point[part]) for name, part in self._columns()}

    @property
    def categorical_names(self) -> list[str]:
        """Names of the ordinary parameters that are categories."""
        return [n for n in self.ordinary_names if isinstance(self.distributions[n], CategoricalDistribution)]

    def allows(self, params: Mapping[str, Any]) -> bool:
        """Returns whether a trial's parameters lie within their ranges, which may have changed since."""
        return all(_contains(distribution, params[name]) for name, distribution in self.distributions.items())

    def _columns(self) -> Iterator[tuple[str, slice]]:
        """Yields each ordinary parameter with its columns of a point."""
        start = 0
        for name in self.ordinary_names:
            stop = start + _width(self.distributions[name])
            yield name, slice(start, stop)
            start = stop

    def random_points(self, n: int, rng: np.random.Generator) -> Array:
        """Draws uniform points of the ordinary parameters, (n, E)."""
        columns = []
        for name in self.ordinary_names:
            distribution = self.distributions[name]
            if isinstance(distribution, CategoricalDistribution):
                columns.append(np.eye(len(distribution.choices))[rng.integers(len(distribution.choices), size=n)])
            else:
                columns.append(rng.random((n, 1)))
        return np.concatenate(columns, axis=1) if columns else np.zeros((n, 0))

    def points_near(self, point: Array, n: int, rng: np.random.Generator) -> Array:
        """Draws points near a good point, (n, E): numbers jittered, a fifth of the categories redrawn."""
        fresh = self.random_points(n, rng)
        columns = []
        for name, part in self._columns():
            good = np.repeat(point[None, part], n, axis=0)
            if isinstance(self.distributions[name], CategoricalDistribution):
                columns.append(np.where(rng.random((n, 1)) < _REDRAWN, fresh[:, part], good))
            else:
                columns.append(np.clip(good + _JITTER * rng.standard_normal((n, 1)), 0, 1))
        return np.concatenate(columns, axis=1)


def _grid_of(distributions: Mapping[str, BaseDistribution], ranks: Mapping[str, tuple[int, str]]) -> RankGrid:
    """Returns the grid of rank parameters, given layer number and series of each in depth order."""
    values = [v for v in (candidate_ranks(distributions[name]) for name in ranks) if v is not None]
    layers, templates = [layer for layer, _ in ranks.values()], [template for _, template in ranks.values()]
    series = sorted(set(templates))
    few = len(series) <= MAX_SERIES
    return RankGrid(
        depth=np.asarray(layers, dtype=np.float64) / max(1, max(layers, default=0)),
        values=values,
        profile=np.zeros(len(values)),
        costs=np.ones(len(values)),
        # candidates, so that a trial can have them
        reference=np.asarray([middle_candidate(distributions[n], v) for n, v in zip(ranks, values, strict=True)]),
        series=np.asarray([series.index(template) if few else 0 for template in templates], dtype=np.intp),
    )


def _contains(distribution: BaseDistribution, value: Any) -> bool:  # noqa: ANN401
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    return bool(distribution.low <= value <= distribution.high)


def _width(distribution: BaseDistribution) -> int:
    return len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 1


def _bounds(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    """Returns the values at 0 and 1; half a step beyond the range, so that every grid value has an equal share."""
    low, high = float(distribution.low), float(distribution.high)
    if distribution.step is not None:
        low, high = low - distribution.step / 2, high + distribution.step / 2
    return (np.log(low), np.log(high)) if distribution.log else (low, high)


def _to_unit(distribution: BaseDistribution, value: Any) -> list[float]:  # noqa: ANN401
    """Returns a value's columns of a point; values outside a range that changed lie in [-1, 2]."""
    if isinstance(distribution, CategoricalDistribution):
        one_hot = [0.0] * len(distribution.choices)
        if value in distribution.choices:  # a choice that was dropped since has zeros only
            one_hot[int(distribution.to_internal_repr(value))] = 1.0
        return one_hot
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high = _bounds(distribution)
    number = np.log(max(float(value), 1e-300)) if distribution.log else float(value)
    return [float(np.clip((number - low) / max(high - low, 1e-300), -1, 2))]


def _from_unit(distribution: BaseDistribution, unit: Array) -> Any:  # noqa: ANN401
    """Returns the value of a parameter's columns of a point."""
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
