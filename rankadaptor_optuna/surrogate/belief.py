"""Belief: a linear function of the features, as a table of values per layer and candidate rank."""

from __future__ import annotations

from dataclasses import dataclass

from rankadaptor_optuna.surrogate.features import ordinary_features
from rankadaptor_optuna.surrogate.grid import Array


@dataclass(frozen=True)
class Belief:
    """A linear function of the features: a Thompson draw, or the posterior mean. Higher is better.

    Attributes:
        table: Value of each candidate rank in each layer, (L, C), in standardised score units.
        weights: Weights of the ordinary parameters' features.
        offset: Value of the reference configuration without its ordinary parameters.
    """

    table: Array
    weights: Array
    offset: float = 0.0

    def plus(self, other: Belief, factor: float) -> Belief:
        """Returns this function plus ``factor`` times another one of the same features."""
        return Belief(
            self.table + factor * other.table,
            self.weights + factor * other.weights,
            self.offset + factor * other.offset,
        )

    def of_ordinary(self, points: Array) -> Array:
        """Returns the value of the ordinary parameters' points (n, E) in the unit cube, (n,)."""
        return self.of_features(ordinary_features(points))

    def of_features(self, features: Array) -> Array:
        """Returns the value of points of the ordinary parameters, given their ``ordinary_features``, (n,)."""
        values: Array = features @ self.weights
        return values
