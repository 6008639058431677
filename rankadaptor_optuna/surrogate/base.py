"""ModelBase: the interface of a performance model, and the observations that both implementations keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.statistics import Standardised

if TYPE_CHECKING:
    from rankadaptor_optuna.space import RankSpace


class ModelBase(ABC):
    """A performance model: predicts the score of a rank configuration from finished trials.

    Args:
        space: The rank space (or a ``RankGrid`` of searched layers).
        direction: ``"maximize"`` or ``"minimize"``: whether higher or lower scores are better.
        n_ordinary: Width of the ordinary parameters' points, 0 where only ranks are searched.

    Attributes:
        mode: Name of the implementation.
        grid: The searched layers.
        features: Features of the observations, (n, F).

    Raises:
        ValueError: The direction is unknown.
    """

    mode: ClassVar[str]

    def __init__(self, space: RankSpace | RankGrid, *, direction: str = "maximize", n_ordinary: int = 0) -> None:
        if direction not in ("maximize", "minimize"):
            raise ValueError(f'direction must be "maximize" or "minimize", got {direction!r}.')
        self.grid = space if isinstance(space, RankGrid) else RankGrid.from_space(space)
        self._direction, self._sign = direction, 1.0 if direction == "maximize" else -1.0
        self._n_ordinary = n_ordinary
        self.features = np.zeros((0, self.n_features))
        self._scores = self._variance = np.zeros(0)  # scores times _sign: higher is better

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Number of features of a configuration, F."""

    @abstractmethod
    def _encode(self, ranks: Array, points: Array) -> Array:
        """Features of ranks (n, L) and ordinary points (n, E), (n, F)."""

    @property
    @abstractmethod
    def _standardised(self) -> Standardised:
        """The scores standardised within the study."""

    @property
    @abstractmethod
    def noise(self) -> float:
        """Standard deviation of a trial's score about its expectation, in score units."""

    @abstractmethod
    def predict(self, ranks: ArrayLike, points: ArrayLike | None = None) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the score, each (n,), in score units."""

    @abstractmethod
    def predict_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the gain over the uniform configuration, each (n,), in score units.

        Positive is better, whatever the direction.
        """

    def encode(self, ranks: ArrayLike, points: ArrayLike | None = None) -> Array:
        """Returns the features of configurations, (n, F).

        Args:
            ranks: Ranks of the searched layers, (n, L) or (L,).
            points: The ordinary parameters in the unit cube, (n, E). Default: its centre.

        Raises:
            ValueError: The number of ranks is not that of the layers.
        """
        ranks = np.atleast_2d(np.asarray(ranks, dtype=np.float64))
        if ranks.shape[1] != self.grid.n_layers:
            raise ValueError(f"expected {self.grid.n_layers} ranks a configuration, got {ranks.shape[1]}.")
        if points is None:
            points = np.full((len(ranks), self._n_ordinary), 0.5)
        return self._encode(ranks, np.atleast_2d(np.asarray(points, dtype=np.float64)))

    def update(
        self, ranks: ArrayLike, scores: ArrayLike, points: ArrayLike | None = None, variance: ArrayLike = 0.0
    ) -> None:
        """Adds finished trials (the paper's online incremental learning, section 3.2).

        Args:
            ranks: Ranks of the searched layers, (n, L) or (L,).
            scores: Their scores, (n,) or a number, finite.
            points: The ordinary parameters in the unit cube, (n, E). Default: its centre.
            variance: Variance of each score beyond the study's common noise, (n,) or a number, in score units squared
                (several evaluations' standard error, or that of a value extrapolated from a pruned trial's reports).

        Raises:
            ValueError: Shapes do not match, or a score or variance is not finite.
        """
        rows = self.encode(ranks, points)
        values = np.atleast_1d(np.asarray(scores, dtype=np.float64))
        if values.shape != (len(rows),) or not np.isfinite(values).all():
            raise ValueError(f"expected {len(rows)} finite scores, got {values.tolist()!r:.80}.")
        extra = np.broadcast_to(np.asarray(variance, dtype=np.float64), values.shape)
        if not (np.isfinite(extra).all() and (extra >= 0).all()):
            raise ValueError(f"a variance must be finite and not negative, got {extra.min()}.")
        self.fit(
            np.concatenate([self.features, rows]),
            np.concatenate([self._sign * self._scores, values]),
            np.concatenate([self._variance, extra]),
        )

    def fit(self, features: Array, scores: Array, variance: Array | None = None) -> None:
        """Replaces all observations: features as ``encode`` returns them, (n, F), scores and their variances, (n,)."""
        self.features, self._scores = np.ascontiguousarray(features), self._sign * scores
        self._variance = np.zeros(len(scores)) if variance is None else variance

    @property
    def targets(self) -> Array:
        """The standardised scores, (n,), higher is better."""
        return self._standardised.targets

    @property
    def spread(self) -> float:
        """Score units per unit of ``targets``, and of a ``Belief``."""
        return self._standardised.spread

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that ``tensors`` does not hold, JSON-able."""
        return {"direction": self._direction, "n_ordinary": self._n_ordinary}

    @property
    def tensors(self) -> dict[str, Array]:
        """The arrays on which predictions and further updates rest, by name, for a file."""
        grid = {f"grid.{name}": value for name, value in self.grid.tensors.items()}
        return {**grid, "features": self.features, "scores": self._scores, "variance": self._variance}

    def restore(self, tensors: Mapping[str, Array]) -> None:
        """Sets the observations, and the state that learned from them, to those of a model with these ``tensors``.

        Raises:
            KeyError: An array is missing.
            ValueError: The shapes do not fit this model.
        """
        features, scores, variance = (tensors[name] for name in ("features", "scores", "variance"))
        if features.shape != (len(scores), self.n_features) or variance.shape != scores.shape:
            raise ValueError(f"{features.shape} features of {scores.shape} scores, expected {self.n_features} a score")
        self.features, self._scores, self._variance = features, scores, variance
