"""RankGrid: the searched layers and their candidate ranks as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.space import RankSpace

Array = NDArray[np.float64]


@dataclass
class RankGrid:
    """The searched layers as the performance model sees them.

    Attributes:
        depth: Relative depth of each layer, (L,), in [0, 1].
        values: Candidate ranks of each layer, L sequences.
        profile: Share of each layer that pruning took, (L,), in [0, 1].
        costs: Cost of one rank in each layer, (L,).
        reference: The uniform configuration, (L,); features are differences from it.
        series: Index of the series of ranks along the depth to which each layer belongs, (L,). Default: zeros.
        sensitivity: Rate at which the loss fell as each layer's adapter was scaled up (``recovery.sensitivity``), (L,).
            Default: unknown (zeros).
        low: Lowest candidate of all layers.
        high: Highest candidate of all layers.
    """

    depth: Array
    values: list[Array]
    profile: Array
    costs: Array
    reference: Array
    series: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, dtype=np.intp))
    sensitivity: Array = field(default_factory=lambda: np.zeros(0))
    low: float = field(init=False, default=0.0)
    high: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        if not len(self.series):
            self.series = np.zeros(len(self.depth), dtype=np.intp)
        if not len(self.sensitivity):
            self.sensitivity = np.zeros(len(self.depth))
        if len(self.values):
            self.low = float(min(v.min() for v in self.values))
            self.high = float(max(v.max() for v in self.values))

    @classmethod
    def from_space(cls, space: RankSpace) -> RankGrid:
        """Returns the grid of a ``RankSpace``; the reference is its uniform configuration."""
        values = np.asarray(space.candidates, dtype=np.float64)
        uniform = space.uniform()
        n_series = len(space.series)
        return cls(
            depth=np.repeat(np.asarray(space.layers, dtype=np.float64), n_series) / max(1, space.n_layers - 1),
            values=[values] * len(space.modules),
            profile=np.asarray(space.profile, dtype=np.float64),
            costs=np.asarray(space.costs, dtype=np.float64),
            reference=np.asarray([uniform[module] for module in space.modules], dtype=np.float64),
            series=np.tile(np.arange(n_series), len(space.layers)),
        )

    @property
    def tensors(self) -> dict[str, Array]:
        """The arrays by name, for a file."""
        widths = np.asarray([len(v) for v in self.values], dtype=np.float64)
        values = np.concatenate([np.zeros(0), *self.values])
        given = [f.name for f in fields(self) if f.init and f.name != "values"]
        return {"values": values, "widths": widths, **{name: np.asarray(getattr(self, name)) for name in given}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> RankGrid:
        """Returns the grid that has these ``tensors``."""
        rest: dict[str, Any] = dict(tensors)
        values, ends = rest.pop("values"), rest.pop("widths").cumsum().astype(int)
        return cls(values=np.split(values, ends[:-1]) if len(ends) else [], **rest)

    @property
    def n_layers(self) -> int:
        """Number of searched layers."""
        return len(self.depth)

    @property
    def n_series(self) -> int:
        """Number of series of ranks along the depth."""
        return int(self.series.max(initial=0)) + 1

    def scaled(self, ranks: Array) -> Array:
        """Returns log2(1 + rank), mapped so that the candidates span [-1, 1]: equal ratios are equal steps."""
        low, high = np.log2(1 + self.low), np.log2(1 + self.high)
        scaled: Array = (2 * np.log2(1 + np.maximum(ranks, 0)) - low - high) / max(high - low, 1e-9)
        return scaled

    def padded_values(self) -> Array:
        """Returns the candidate ranks, (L, C), short rows padded with their last value."""
        width = max((len(v) for v in self.values), default=1)
        rows = [np.concatenate([v, np.full(width - len(v), v[-1])]) for v in self.values]
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), width)
