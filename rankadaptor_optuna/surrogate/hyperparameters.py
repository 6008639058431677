"""The hyperparameter grid of the Bayesian head: prior mean and spread of the weights of each feature group, and noise.

Scores are standardised within a study, so one unit below is one standard deviation of its scores. "Signal" is the prior
standard deviation of the weight of the first smooth feature; all groups are given in its units.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from rankadaptor_optuna.surrogate.features import N_SMOOTH, feature_groups
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.head import Hyperparameters
from rankadaptor_optuna.surrogate.prior import Prior

# The grid. Signal sizes and TREND were chosen on development tasks (emulated recoveries and simulated worlds), together
# with the sampler's choice among several draws: the normalised regret of a recommendation after 25 trials fell from
# 0.19 to 0.14. The other axes were set by hand.
_SIGNALS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Signal sizes of the model of failures, in logits; at the first one failures do not depend on the configuration.
_FAILURE_SIGNALS = (1e-3, 0.8, 3.0, 12.0)  # set by hand
_RESIDUALS = (0.2, 1.0)  # free residual of each layer, in units of the signal
_NOISES = (0.1, 0.3, 0.9)
_SWITCHED_OFF = 1e-3  # scale of the meta-learned features in the points that do not believe the prior; set by hand
TREND = 2.0  # prior mean of the weight of total rank, in units of the signal: more rank is expected to help

# The middle point, at which a prior is learned; set by hand.
_SIGNAL, _RESIDUAL, _NOISE = 0.5, 0.2, 0.3

# Prior standard deviations in units of the signal.
_INTERCEPT = 3.0  # in score units: wide beside scores of standard deviation 1; set by hand
# Curvature in a layer's rank. With it and the squared total, the 95% intervals on two development tasks held 94%
# instead of 85%; the value was set by hand.
_CURVATURE = 0.5
_PROFILE = 0.7  # set by hand
_SENSITIVITY = 0.7  # how far the worth of rank strays from being proportional to sensitivity; set by hand
# How far the first and the last layers stand out. In searches of functions fitted to 45 collected tasks, without a
# prior, the regret of a recommendation after 5, 10 and 25 trials was 0.38, 0.25 and 0.11 with these features, and 0.47,
# 0.28 and 0.10 without; the value was set by hand.
_ENDS = 4.0
_DIFFERENCE = 0.7  # how far the functions of several series differ, as a share of what they have in common; by hand

# Odds, before any trial, that a prior learned from other tasks holds for this one. In searches of functions fitted to
# the recoveries of ten development families, sensitivities unknown, after 2, 5, 10 and 25 trials, a prior with these
# odds had 0.02, 0.02, 0.03 and 0.00 less regret than none, and a prior learned from negated scores 0.04, 0.00, -0.01
# and 0.00 more. `python -m benchmarks.transfer` measures the same on recoveries.
_BELIEF = 0.2


def hyperparameter_points(
    grid: RankGrid,
    prior: Prior | None,
    n_features: int,
    trend: float = TREND,
) -> list[Hyperparameters]:
    """Returns the grid: signal size x free residual x noise x whether the prior is believed.

    Args:
        grid: The searched layers.
        prior: The meta-learned prior, or None.
        n_features: Number of features, F: intercept, ranks' features, squared total, ordinary parameters' features.
        trend: Prior mean of the weight of total rank, in units of the signal.
    """
    believed = (1.0, _SWITCHED_OFF) if prior is not None else (_SWITCHED_OFF,)
    points = _Points(grid, prior, n_features, trend)
    return [points.at(*values) for values in itertools.product(_SIGNALS, _RESIDUALS, _NOISES, believed)]


def with_cost(point: Hyperparameters) -> Hyperparameters:
    """Returns a point with one more feature, the total cost, whose weight varies as that of the total log rank."""
    return replace(point, mean=np.append(point.mean, 0), std=np.append(point.std, point.std[1]))


def failure_priors(grid: RankGrid, n_features: int) -> list[Array]:
    """Returns priors of the model of failures: standard deviations of the weights, (F + 1,) each, the cost's last."""
    points = _Points(grid, None, n_features, trend=0)
    found = [points.at(*values, _NOISE, _SWITCHED_OFF) for values in itertools.product(_FAILURE_SIGNALS, _RESIDUALS)]
    return [with_cost(point).std for point in found]


def middle_hyperparameters(grid: RankGrid, n_features: int) -> Hyperparameters:
    """Returns the point that meta-learning assumes for the features that are not learned."""
    return _Points(grid, None, n_features, TREND).at(_SIGNAL, _RESIDUAL, _NOISE, _SWITCHED_OFF)


class _Points:
    """Hyperparameters for the features of one search space."""

    def __init__(self, grid: RankGrid, prior: Prior | None, n_features: int, trend: float) -> None:
        self._grid, self._prior, self._trend = grid, prior, trend
        self._columns = feature_groups(grid, None if prior is None else prior.mlp)
        self._n_rank_features = self._columns["mlp"].stop
        self._n_ordinary_features = n_features - 2 - self._n_rank_features

    def at(self, signal: float, residual: float, noise: float, belief: float) -> Hyperparameters:
        mean, std = self._of_ranks(signal, residual, belief)
        total = signal / np.sqrt(max(1, self._grid.n_layers))  # so that total rank bends the score alike at any depth
        return Hyperparameters(
            mean=np.concatenate([[0.0], mean, np.zeros(1 + self._n_ordinary_features)]),
            std=np.concatenate([[_INTERCEPT], std, [total], np.full(self._n_ordinary_features, signal)]),
            noise=noise,
            log_prior=float(np.log(_BELIEF)) if belief == 1 else 0.0,
        )

    def _of_ranks(self, signal: float, residual: float, belief: float) -> tuple[Array, Array]:
        """Prior mean and standard deviation of the weights of the ranks' features."""
        columns = self._columns
        mean, std = np.zeros(self._n_rank_features), np.empty(self._n_rank_features)
        std[columns["smooth"]] = signal / (1 + np.arange(N_SMOOTH) / 2)  # slow changes along the depth are likelier
        mean[columns["smooth"].start] = self._trend * signal
        std[columns["curvature"]] = _CURVATURE * signal
        std[columns["profile"]] = _PROFILE * signal
        std[columns["sensitivity"]] = _SENSITIVITY * signal
        mean[columns["sensitivity"]][:1] = self._trend * signal  # no column where sensitivities are unknown
        std[columns["ends"]] = _ENDS * signal
        std[columns["residual"]] = residual * signal
        std[columns["residual curvature"]] = _CURVATURE * residual * signal
        std[columns["difference"]] = np.tile(_DIFFERENCE * std[: columns["ends"].stop], self._grid.n_series - 1)
        if self._prior is not None:
            scale = belief * signal / _SIGNAL  # learned weights grow with the signal like all others
            std[columns["mlp"]] = scale * self._prior.std
            mean[columns["mlp"]] = scale * self._prior.mean
        return mean, std
