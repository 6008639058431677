"""Rank vector -> features, at any depth.

Every feature is a sum over layers of a function of that layer alone (its rank, place, pruning profile and sensitivity),
so that one prior serves models of any number of layers, and a linear function of the features is a table ``[layer,
candidate]`` that can be optimised exactly under a budget.

Where a layer has several ranks (attention and MLP, say) there are several series of them along the depth: functions
that have something in common and differ otherwise. Each rank of a series counts as a layer below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_optuna.surrogate.grid import Array, RankGrid

if TYPE_CHECKING:
    pass


N_SMOOTH = 8
N_CURVATURE = 4
N_PROFILE = 2
N_SENSITIVITY = 2
N_ENDS = 2
N_INPUTS = 3  # of the MLP
_POWER = 1.5  # of a sensitivity: where an adapter does much, more rank is worth more than in proportion


@dataclass(frozen=True)
class MLP:
    """The meta-learned feature network: ``mlp_inputs`` of one layer -> M features, tanh inside.

    Attributes:
        weights: Matrices of the layers, each (in, out).
        biases: Their biases, each (out,).
    """

    weights: Sequence[Array]
    biases: Sequence[Array]

    def __post_init__(self) -> None:
        # products differ in their last bits with the memory layout, which a file does not keep
        object.__setattr__(self, "weights", [np.ascontiguousarray(weight) for weight in self.weights])

    def __call__(self, inputs: Array) -> Array:
        """Maps (..., 3) to (..., M)."""
        first = self.weights[0][:N_INPUTS]  # once there was a fourth input, the sensitivity, which was 0 where unknown
        hidden = inputs
        for weight, bias in zip([first, *self.weights[1:-1]], self.biases[:-1], strict=True):
            hidden = np.tanh(hidden @ weight + bias)
        out: Array = hidden @ self.weights[-1] + self.biases[-1]
        return out

    @property
    def n_features(self) -> int:
        """M."""
        return int(self.weights[-1].shape[1])


def groups(grid: RankGrid, mlp: MLP | None) -> dict[str, slice]:
    """Columns of each feature group, in the order in which ``per_layer`` lays them out."""
    function = {  # what a function along the depth is made of
        "smooth": N_SMOOTH,
        "curvature": N_CURVATURE,
        "profile": N_PROFILE,
        "sensitivity": N_SENSITIVITY if _sensitivity(grid).any() else 0,
        "ends": N_ENDS,
    }
    sizes = {
        **function,
        "residual": grid.n_layers,
        "residual curvature": grid.n_layers,
        "difference": sum(function.values()) * (grid.n_series - 1),
        "mlp": 0 if mlp is None else mlp.n_features,
    }
    ends = np.cumsum(list(sizes.values()))
    return {name: slice(int(end) - size, int(end)) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _profile(grid: RankGrid) -> Array:
    """The layer profile standardised over the layers of each series, (L,); zeros where all of them are alike."""
    standardised = np.zeros(grid.n_layers)
    for series in np.unique(grid.series):
        profile = grid.profile[grid.series == series]
        spread = profile.std()
        if spread > 1e-6:
            standardised[grid.series == series] = (profile - profile.mean()) / spread
    return standardised


def _sensitivity(grid: RankGrid) -> Array:
    """The layers' sensitivities relative to their mean, less 1, (L,); zeros where they are unknown."""
    powers: Array = np.maximum(grid.sensitivity, 0) ** _POWER
    return powers / powers.mean() - 1 if powers.any() else np.zeros(grid.n_layers)


def contrasts(n_series: int) -> Array:
    """How series may differ, (S, S - 1): orthogonal columns of sum 0 (Helmert), each row of unit length.

    With independent weights of equal spread no series is favoured, whatever their order; two series are +1 and -1.
    """
    row, column = np.arange(n_series)[:, None], np.arange(1, n_series)
    helmert = np.where(row < column, 1.0, np.where(row == column, -column, 0)) / np.sqrt(column * (column + 1))
    scaled: Array = helmert * np.sqrt(n_series / max(1, n_series - 1))
    return scaled


def _ends(grid: RankGrid) -> Array:
    """How near each layer is to the first and to the last one of its series, (L, 2): e^-d at d layers from it."""
    near = np.zeros((grid.n_layers, N_ENDS))
    for series in np.unique(grid.series):
        rows = np.flatnonzero(grid.series == series)
        place = grid.depth[rows].argsort(kind="stable").argsort(kind="stable")
        near[rows] = np.exp(-np.stack([place, len(rows) - 1 - place], axis=1))
    return near


def mlp_inputs(grid: RankGrid, ranks: Array) -> Array:
    """What the MLP sees of each layer: scaled rank, relative depth and standardised profile, (n, L, 3).

    Not the sensitivity: features of their own rest on that where it is known, and where it is not a prior has to do.
    """
    t = grid.scaled(ranks)
    return np.stack(np.broadcast_arrays(t, grid.depth, _profile(grid)), axis=2)


def per_layer(grid: RankGrid, ranks: Array, mlp: MLP | None) -> Array:
    """Features of each layer's rank, (n, L, F), for ``ranks`` (n, L); the configuration's are their sum over L."""
    n_layers = grid.n_layers
    t = grid.scaled(ranks)[:, :, None]
    cosines = np.cos(np.pi * grid.depth[:, None] * np.arange(N_SMOOTH))
    profile, sensitivity = _profile(grid)[:, None], _sensitivity(grid)[:, None]
    parts = [t * cosines, t**2 * cosines[:, :N_CURVATURE], t * profile, t**2 * profile]
    parts += [t * sensitivity, t**2 * sensitivity] if sensitivity.any() else []
    parts.append(t * _ends(grid))
    function = np.concatenate(parts, axis=2)
    blocks = [function, t * np.eye(n_layers), t**2 * np.eye(n_layers)]
    blocks += [function * column[:, None] for column in contrasts(grid.n_series)[grid.series].T]
    if mlp is not None:
        blocks.append(mlp(mlp_inputs(grid, ranks)))
    features: Array = np.concatenate(blocks, axis=2) / np.sqrt(max(1, n_layers))
    return features


def ordinary(points: Array, n_features: int = 64) -> Array:
    """Features of the parameters that are not ranks: linear, squared and random Fourier ones of an RBF kernel.

    Args:
        points: Parameters scaled to the unit cube, categorical ones one-hot, (n, E).
        n_features: Number of random Fourier features (Rahimi & Recht, 2007).

    Returns:
        (n, 2 E + n_features); no columns where E is 0.
    """
    width = points.shape[1]
    if width == 0:
        return np.zeros((len(points), 0))
    rng = np.random.default_rng(width)  # a fixed basis: the same features in every process
    frequencies = rng.standard_normal((width, n_features)) / 0.3
    phases = rng.uniform(0, 2 * np.pi, n_features)
    fourier = np.sqrt(2 / n_features) * np.cos(points @ frequencies + phases)
    centred = 2 * points - 1
    return np.concatenate([centred, centred**2, fourier], axis=1)
