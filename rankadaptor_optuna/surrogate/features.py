"""Features of a rank configuration, for models of any depth.

Every feature of the ranks is a sum over layers of a function of that layer alone (its rank, depth, pruning profile and
sensitivity). So one prior serves models of any number of layers, and a linear function of the features is a table
``[layer, candidate]`` that is optimised exactly under a budget.

Where a layer has several ranks (attention and MLP, say), there are several series of ranks along the depth: functions
of depth that share a part and differ in another. Here, "layer" stands for each of these ranks.

Notation:
    L       number of searched layers
    S       number of series along the depth
    M       number of outputs of the meta-learned network
    r_l     rank of layer l
    t_l     scaled rank, ``RankGrid.scaled``: log2(1 + r_l) mapped so that the candidates span [-1, 1]
    x_l     relative depth of layer l, in [0, 1]
    p_l     layer profile (share that pruning took), standardised over the layers of the series
    s_l     sensitivity to the power 1.5, divided by its mean over the layers, less 1
    d_l     number of layers between layer l and the first, or last, one of its series

Feature groups (columns of ``layer_features``, named as in ``feature_groups``); all are divided by sqrt(L), so that a
configuration's features have the same scale at any depth:
    smooth              t_l cos(pi k x_l)           k = 0..7     8
    curvature           t_l^2 cos(pi k x_l)         k = 0..3     4
    profile             t_l p_l, t_l^2 p_l                       2
    sensitivity         t_l s_l, t_l^2 s_l                       2, none where sensitivities are unknown
    ends                t_l exp(-d_l)               both ends    2
    residual            t_l for layer l, else 0                  L
    residual curvature  t_l^2 for layer l, else 0                L
    difference          contrast of the series x all groups above the residuals, S - 1 times
    mlp                 outputs of the meta-learned network      M
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankadaptor_optuna.surrogate.grid import Array, RankGrid

# the number of features in each group was set by hand, so were the two constants below
N_SMOOTH = 8
N_CURVATURE = 4
N_PROFILE = 2
N_SENSITIVITY = 2
N_ENDS = 2
N_INPUTS = 3  # of the MLP
_POWER = 1.5  # of a sensitivity: where an adapter does much, more rank is worth more than in proportion
_LENGTH_SCALE = 0.3  # of the RBF kernel over the unit cube of the ordinary parameters


@dataclass(frozen=True)
class MLP:
    """The meta-learned feature network: ``mlp_inputs`` of one layer -> M features; tanh in the hidden layers.

    Attributes:
        weights: Matrices of its layers, each (in, out).
        biases: Biases of its layers, each (out,).
    """

    weights: Sequence[Array]
    biases: Sequence[Array]

    def __post_init__(self) -> None:
        # the last bits of a product depend on the memory layout, which a file does not keep
        object.__setattr__(self, "weights", [np.ascontiguousarray(weight) for weight in self.weights])

    def __call__(self, inputs: Array) -> Array:
        """Maps (..., 3) to (..., M)."""
        hidden = inputs
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = np.tanh(hidden @ weight + bias)
        out: Array = hidden @ self.weights[-1] + self.biases[-1]
        return out

    @property
    def n_features(self) -> int:
        """Number of outputs, M."""
        return int(self.weights[-1].shape[1])


def feature_groups(grid: RankGrid, mlp: MLP | None) -> dict[str, slice]:
    """Returns the columns of each feature group of ``layer_features``, in their order."""
    function = {  # groups that make up one function of depth
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


def layer_features(grid: RankGrid, ranks: Array, mlp: MLP | None) -> Array:
    """Returns the features of each layer's rank, (n, L, F), for ``ranks`` (n, L).

    A configuration's features are their sum over the layers.
    """
    n_layers = grid.n_layers
    t = grid.scaled(ranks)[:, :, None]
    cosines = np.cos(np.pi * grid.depth[:, None] * np.arange(N_SMOOTH))
    profile, sensitivity = _profile(grid)[:, None], _sensitivity(grid)[:, None]
    parts = [t * cosines, t**2 * cosines[:, :N_CURVATURE], t * profile, t**2 * profile]
    parts += [t * sensitivity, t**2 * sensitivity] if sensitivity.any() else []
    parts.append(t * _ends(grid))
    function = np.concatenate(parts, axis=2)
    blocks = [function, t * np.eye(n_layers), t**2 * np.eye(n_layers)]
    blocks += [function * column[:, None] for column in series_contrasts(grid.n_series)[grid.series].T]
    if mlp is not None:
        blocks.append(mlp(mlp_inputs(grid, ranks)))
    features: Array = np.concatenate(blocks, axis=2) / np.sqrt(max(1, n_layers))
    return features


def mlp_inputs(grid: RankGrid, ranks: Array) -> Array:
    """Returns the MLP's inputs of each layer: scaled rank, relative depth and standardised profile, (n, L, 3).

    The sensitivity is left out: it has features of its own where it is known, and a prior is needed where it is not.
    """
    t = grid.scaled(ranks)
    return np.stack(np.broadcast_arrays(t, grid.depth, _profile(grid)), axis=2)


def series_contrasts(n_series: int) -> Array:
    """Returns the contrasts between series, (S, S - 1): orthogonal columns of sum 0, each row of unit length.

    They are Helmert contrasts. With independent weights of equal spread, no series is favoured, whatever their order;
    the contrast of two series is +1 and -1.
    """
    row, column = np.arange(n_series)[:, None], np.arange(1, n_series)
    helmert = np.where(row < column, 1.0, np.where(row == column, -column, 0)) / np.sqrt(column * (column + 1))
    scaled: Array = helmert * np.sqrt(n_series / max(1, n_series - 1))
    return scaled


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


def _ends(grid: RankGrid) -> Array:
    """Closeness of each layer to the first and to the last layer of its series, (L, 2): exp(-d) at a distance of d."""
    near = np.zeros((grid.n_layers, N_ENDS))
    for series in np.unique(grid.series):
        rows = np.flatnonzero(grid.series == series)
        place = grid.depth[rows].argsort(kind="stable").argsort(kind="stable")
        near[rows] = np.exp(-np.stack([place, len(rows) - 1 - place], axis=1))
    return near


def ordinary_features(points: Array, n_features: int = 64) -> Array:
    """Returns features of the parameters that are not ranks: linear, squared, and random Fourier features.

    Args:
        points: Parameters scaled to the unit cube, categorical ones one-hot, (n, E).
        n_features: Number of random Fourier features of an RBF kernel (Rahimi & Recht, 2007, algorithm 1).

    Returns:
        (n, 2 E + n_features); no columns where E is 0.
    """
    width = points.shape[1]
    if width == 0:
        return np.zeros((len(points), 0))
    rng = np.random.default_rng(width)  # a fixed basis: the same features in every process
    frequencies = rng.standard_normal((width, n_features)) / _LENGTH_SCALE
    phases = rng.uniform(0, 2 * np.pi, n_features)
    fourier = np.sqrt(2 / n_features) * np.cos(points @ frequencies + phases)
    centred = 2 * points - 1
    return np.concatenate([centred, centred**2, fourier], axis=1)
