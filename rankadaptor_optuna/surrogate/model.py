"""PerformanceModel: predicts what a rank configuration will score, from the trials so far.

One class with its file format, so a little long: the mathematics is in ``head``, the features in ``features``.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from rankadaptor_optuna.surrogate.features import MLP, N_SMOOTH, groups, ordinary, per_layer
from rankadaptor_optuna.surrogate.files import read, write
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.head import BayesianHead, Hyperparameters
from rankadaptor_optuna.surrogate.prior import Prior, load_prior
from rankadaptor_optuna.surrogate.statistics import Standardised, standardise

if TYPE_CHECKING:
    from rankadaptor_optuna.space import RankSpace
    from rankadaptor_optuna.surrogate.paper import Network

FORMAT = "performance-model-4"  # of files; they hold features, so it rises where these change, too
_DIFFERENCE = 0.7  # how much series differ, as a share of what they have in common
_ENDS = 4.0  # how far the first and the last layers may stand out, in units of how much layers vary
_SENSITIVITY = 0.7  # how far the worth of rank strays from being proportional to the layers' sensitivity, likewise
_SIGNAL = 0.5  # the grid's middle, at which priors are learned
_TREND = 2.0  # more rank helps, in units of how much layers vary, until the data says otherwise
_APART = 1 / 3  # what a seed's recoveries do not share with others', by variance, to what they do (calibration.py)
_MISFIT = 0.3  # how far a bad score may be off (standard deviation), as a share of what it is below the median
_BELIEF = 0.2  # odds, before any trial, that what the prior learned from other tasks holds for this one
_CAUTION = 0.5  # standard deviations: the best of a great many predictions is one that errs upwards


@dataclass(frozen=True)
class Belief:
    """A linear function of the features: a Thompson draw, or the posterior mean. Higher is better.

    Attributes:
        table: Value of each candidate rank in each layer, (L, C), in standardised score units.
        weights: Weights of the features of the parameters that are not ranks.
        offset: Value of the reference configuration without these.
    """

    table: Array
    weights: Array
    offset: float = 0.0

    def plus(self, other: Belief, factor: float) -> Belief:
        """This and ``factor`` times another function of the same features."""
        return Belief(
            self.table + factor * other.table,
            self.weights + factor * other.weights,
            self.offset + factor * other.offset,
        )

    def of_ordinary(self, points: Array) -> Array:
        """Value of the other parameters' points (n, E) in the unit cube, (n,)."""
        values: Array = ordinary(points) @ self.weights
        return values


class PerformanceModel:
    """Meta-learned MLP features and a closed-form Bayesian head (the role of the paper's section 3.2).

    The score is modelled as a sum over layers. Each layer's part has a component that is smooth along the depth, its
    curvature in rank, one that follows what pruning took, one that follows the layers' sensitivities where they are
    known, one for the first and the last layers, which stand out, a free residual with a curvature of its own, and the
    meta-learned MLP's features. Beside the sum stands the square of the total (log) rank: the less of it there is, the
    more each rank is worth.

    Args:
        space: The rank space (or a ``RankGrid`` of searched layers).
        prior: ``"pretrained"`` (shipped), None, a path, or a ``Prior``.
        direction: ``"maximize"`` or ``"minimize"``: whether higher or lower scores are better.
        n_ordinary: Width of the other parameters' points, 0 where only ranks are searched.
        mode: ``"bayesian"``, or ``"paper"`` for the paper's gradient-trained MLP: see ``surrogate.paper.PaperModel``.
        hidden: Widths of the three hidden layers; paper mode only.
        seed: Seed of initialisation and training; paper mode only, the other draws nothing by itself.

    Raises:
        ValueError: The prior cannot be read, or the direction, mode or hidden widths are not known.
    """

    mode = "bayesian"

    def __new__(cls, *_: Any, mode: str = "bayesian", **__: Any) -> PerformanceModel:  # noqa: ANN401
        """Makes the class of the ``mode``."""
        return super().__new__(_class_of(mode) if cls is PerformanceModel else cls)

    def __init__(
        self,
        space: RankSpace | RankGrid,
        *,
        prior: Prior | Network | str | os.PathLike[str] | None = "pretrained",
        direction: str = "maximize",
        n_ordinary: int = 0,
        mode: str = "bayesian",
        hidden: Sequence[int] = (32, 32, 32),
        seed: int = 0,
    ) -> None:
        if mode != self.mode:
            raise ValueError(f"{type(self).__name__} is of mode {self.mode!r}, got {mode!r}.")
        if direction not in ("maximize", "minimize"):
            raise ValueError(f'direction must be "maximize" or "minimize", got {direction!r}.')
        if not (prior is None or isinstance(prior, (Prior, str, os.PathLike))):
            raise ValueError(f"mode {mode!r} starts from a Prior or the path of one, got {type(prior).__name__}.")
        self.grid = space if isinstance(space, RankGrid) else RankGrid.from_space(space)
        self._prior = prior if isinstance(prior, Prior) else load_prior(prior)
        self._direction, self._sign = direction, 1.0 if direction == "maximize" else -1.0
        self._n_ordinary = n_ordinary
        self.features = np.zeros((0, self._width))
        self._scores = self._variance = np.zeros(0)

    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]  # what help() shows

    @property
    def _mlp(self) -> MLP | None:
        return None if self._prior is None else self._prior.mlp

    @cached_property
    def _reference(self) -> Array:
        return per_layer(self.grid, self.grid.reference[None], self._mlp)[0]

    @cached_property
    def _of_candidates(self) -> Array:
        return per_layer(self.grid, self.grid.padded_values().T, self._mlp) - self._reference

    @cached_property
    def _rank_width(self) -> int:
        return groups(self.grid, self._mlp)["mlp"].stop

    @cached_property
    def _width(self) -> int:
        return 2 + self._rank_width + ordinary(np.zeros((1, self._n_ordinary))).shape[1]

    def encode(self, ranks: ArrayLike, points: ArrayLike | None = None) -> Array:
        """Features of configurations, (n, F): an intercept (not in paper mode), the ranks' and the other parameters'.

        Raises:
            ValueError: The number of ranks is not that of the layers.
        """
        ranks = np.atleast_2d(np.asarray(ranks, dtype=np.float64))
        if ranks.shape[1] != self.grid.n_layers:
            raise ValueError(f"expected {self.grid.n_layers} ranks a configuration, got {ranks.shape[1]}.")
        if points is None:
            points = np.full((len(ranks), self._n_ordinary), 0.5)
        return self._rows(ranks, np.atleast_2d(np.asarray(points, dtype=np.float64)))

    def _rows(self, ranks: Array, points: Array) -> Array:
        rank_part = (per_layer(self.grid, ranks, self._mlp) - self._reference).sum(1)
        return np.concatenate([np.ones((len(ranks), 1)), rank_part, rank_part[:, :1] ** 2, ordinary(points)], axis=1)

    def update(
        self, ranks: ArrayLike, scores: ArrayLike, points: ArrayLike | None = None, variance: ArrayLike = 0.0
    ) -> None:
        """Adds finished trials (the paper's online incremental learning); the posterior stays exact.

        Args:
            ranks: Ranks of the searched layers, (n, L) or (L,).
            scores: Their scores, (n,) or a number, finite.
            points: The other parameters in the unit cube, (n, E).
            variance: How uncertain each score is beyond the study's common noise, (n,) or a number, in score units
                squared (several evaluations' standard error, or a value extrapolated from a pruned trial's reports).

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
        """Replaces all observations: features as ``encode`` makes them, (n, F), scores and their variances, (n,).

        An observation may also be a sum of others with weights that add up to 0, in features and score alike: a
        difference says nothing of what all scores have in common.
        """
        self.features, self._scores = np.ascontiguousarray(features), self._sign * scores
        self._variance = np.zeros(len(scores)) if variance is None else variance
        for stale in ("_head", "_standardised"):
            self.__dict__.pop(stale, None)

    @cached_property
    def _standardised(self) -> Standardised:
        """Differences of scores, which have no intercept, are scaled only.

        A sum over layers is right within a range at best. Which range matters is known: what is worse than most must
        not bend the model where the optimum is, so it counts for less, the worse it is.
        """
        whole = self.features[:, 0] > 0.5
        of_whole = standardise(self._scores[whole])
        targets, doubt = self._scores / of_whole.spread, np.zeros(len(whole))
        median = np.median(of_whole.targets) if whole.any() else 0.0
        below = np.maximum(median - of_whole.targets, 0)
        targets[whole], doubt[whole] = of_whole.targets, of_whole.doubt + (_MISFIT * below) ** 2
        return of_whole._replace(targets=targets, doubt=doubt)

    @property
    def targets(self) -> Array:
        """The standardised scores that the head fits, (n,), higher is better."""
        return self._standardised.targets

    @property
    def spread(self) -> float:
        """What one unit of a ``Belief`` is in score units."""
        return self._standardised.spread

    @cached_property
    def _head(self) -> BayesianHead:
        extra = self._variance / self.spread**2 + self._standardised.doubt
        return BayesianHead(self.features, self.targets, self._hyperparameters, extra)

    def constraint(self, features: Array, values: Array) -> Belief:
        """The posterior mean of a constraint (n,), another function of the same features (n, F): scaled, not centred.

        The mean and no Thompson draw: what to avoid need not be explored.
        """
        scale = float(np.sqrt(np.mean(values**2))) or 1.0
        return self._belief(BayesianHead(features, values / scale, self._grid_of(trend=0)).mean)

    @cached_property
    def _hyperparameters(self) -> list[Hyperparameters]:
        return self._grid_of(_TREND)

    def _grid_of(self, trend: float) -> list[Hyperparameters]:
        """Signal size x free residual x noise x whether the meta-learned features are believed."""
        believed = (1.0, 1e-3) if self._prior is not None else (1e-3,)
        axes = itertools.product((0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.2, 1.0), (0.1, 0.3, 0.9), believed)
        return [self._point(*values, trend) for values in axes]

    def middle_hyperparameters(self) -> Hyperparameters:
        """The grid's middle point, which meta-training assumes for the features that are not learned."""
        return self._point(_SIGNAL, 0.2, 0.3, 1e-3, _TREND)

    def _point(self, signal: float, residual: float, noise: float, belief: float, trend: float) -> Hyperparameters:
        columns = groups(self.grid, self._mlp)
        mean, std = np.zeros(self._rank_width), np.empty(self._rank_width)
        std[columns["smooth"]] = signal / (1 + np.arange(N_SMOOTH) / 2)
        mean[columns["smooth"].start] = trend * signal
        std[columns["curvature"]] = 0.5 * signal
        std[columns["profile"]] = 0.7 * signal
        std[columns["sensitivity"]] = _SENSITIVITY * signal
        mean[columns["sensitivity"]][:1] = trend * signal  # no column where they are unknown
        std[columns["ends"]] = _ENDS * signal
        std[columns["residual"]] = residual * signal
        std[columns["residual curvature"]] = 0.5 * residual * signal
        std[columns["difference"]] = np.tile(_DIFFERENCE * std[: columns["ends"].stop], self.grid.n_series - 1)
        if self._prior is not None:
            scale = belief * signal / _SIGNAL  # what was learned is as large as the rest of the signal is
            std[columns["mlp"]] = scale * self._prior.std
            mean[columns["mlp"]] = scale * self._prior.mean
        n_rest = self._width - 2 - self._rank_width
        total = signal / np.sqrt(max(1, self.grid.n_layers))  # so that it bends alike at any depth
        return Hyperparameters(
            mean=np.concatenate([[0.0], mean, np.zeros(1 + n_rest)]),
            std=np.concatenate([[3.0], std, [total], np.full(n_rest, signal)]),
            noise=noise,
            log_prior=float(np.log(_BELIEF)) if belief == 1 else 0.0,
        )

    @property
    def noise(self) -> float:
        """Estimated standard deviation of a trial's score about its expectation, in the scores' own units."""
        return self.spread * self._head.noise

    def predict(self, ranks: ArrayLike, points: ArrayLike | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation of the score without trial noise, each (n,), in the scores' own units."""
        mean, std = self._head.predict(self.encode(ranks, points))
        return self._sign * (self._standardised.location + self.spread * mean), self.spread * std

    def predict_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Mean and standard deviation of how much better than the uniform configuration, each (n,), in score units.

        Positive is better whatever the direction. What all configurations share cancels, so the interval is
        narrower than the difference of two predictions.
        """
        return self.predict_difference(self.encode(ranks), self.encode(self.grid.reference))

    def predict_lasting_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """As ``predict_gain``, of what lasts on other seeds of the recovery and on other text.

        All trials of a study share a seed, of which a part of their differences is; no number of them tells that part
        from the rest. It is taken to have a third of the variance of what lasts.
        """
        mean, std = self._head.predict_shared(self.encode(ranks) - self.encode(self.grid.reference), _APART)
        return self.spread * mean, self.spread * std

    def predict_difference(self, features: Array, others: Array) -> tuple[Array, Array]:
        """As ``predict_gain``, of configurations over others, both as ``encode`` makes them, (n, F)."""
        mean, std = self._head.predict(features - others)
        return self.spread * mean, self.spread * std

    def lower_bound(self, difference: Array) -> tuple[float, Belief]:
        """Half a standard deviation below the gain of a configuration over another.

        Args:
            difference: Their features' difference, as ``encode`` makes them, (F,).

        Returns:
            The bound, in standardised score units, and the function of the features that is this bound there and
            nowhere below the bound of others.
        """
        covariance = self._head.covariance_with(difference)
        std = float(np.sqrt(np.maximum(difference @ covariance, 0)))
        weights = self._head.mean - _CAUTION * covariance / (std or 1.0)
        return float(weights @ difference), self._belief(weights)

    def _belief(self, weights: Array) -> Belief:
        """The function of these weights; the square of the total by its tangent where the best trial is."""
        ranks, square, rest = np.split(weights[1:], [self._rank_width, self._rank_width + 1])
        if self.grid.n_layers == 0:
            return Belief(np.zeros((0, 1)), rest, float(weights[0]))
        total = self._total_of_best
        features = self._of_candidates
        table = (features @ ranks + 2 * square * total * features[:, :, 0]).T
        return Belief(table, rest, float(weights[0] - square[0] * total**2))

    @property
    def _total_of_best(self) -> float:
        """The total (log) rank of the observation with the best score, as far from uniform's as features have it."""
        whole = np.flatnonzero(self.features[:, 0] > 0.5)
        return float(self.features[whole[self._scores[whole].argmax()], 1]) if len(whole) else 0.0

    def sample(self, rng: np.random.Generator) -> Belief:
        """A Thompson draw from the posterior (from the prior where nothing has finished)."""
        return self._belief(self._head.sample(rng))

    def mean(self) -> Belief:
        """The posterior mean."""
        return self._belief(self._head.mean)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all that predictions and further updates rest on, as safetensors.

        Raises:
            ValueError: The file cannot be written.
        """
        settings = {"mode": self.mode, "direction": self._direction, "n_ordinary": self._n_ordinary, **self._settings()}
        write(path, self._tensors(), {"format": FORMAT, "settings": json.dumps(settings)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerformanceModel:
        """Reads what ``save`` wrote; it predicts the same to the last bit, and goes on where that one stopped.

        Raises:
            ValueError: The file is missing, holds no performance model, or is of another format.
        """
        tensors, metadata = read(path, "performance model", FORMAT)
        try:
            settings = json.loads(metadata["settings"])
            grid = RankGrid.of(within("grid", tensors))
            prior = within("prior", tensors)
            model = _class_of(settings["mode"])(grid, prior=Prior.of(prior) if prior else None, **settings)
            model._restore(tensors)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the performance model {os.fspath(path)!r}: {error!r}") from error
        return model

    def _settings(self) -> dict[str, Any]:
        return {}

    def _tensors(self) -> dict[str, Array]:
        prior = {} if self._prior is None else self._prior.tensors
        return {
            **{f"grid.{name}": value for name, value in self.grid.tensors.items()},
            **{f"prior.{name}": value for name, value in prior.items()},
            "features": self.features,
            "scores": self._scores,
            "variance": self._variance,
        }

    def _restore(self, tensors: Mapping[str, Array]) -> None:
        features, scores, variance = (tensors[name] for name in ("features", "scores", "variance"))
        if features.shape != (len(scores), self._width) or variance.shape != scores.shape:
            raise ValueError(f"{features.shape} features of {scores.shape} scores, expected {self._width} a score")
        self.features, self._scores, self._variance = features, scores, variance


def within(group: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Those tensors whose names start with the group's, without it."""
    return {name[len(group) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{group}.")}


def _class_of(mode: str) -> type[PerformanceModel]:
    if mode == "bayesian":
        return PerformanceModel
    if mode == "paper":
        from rankadaptor_optuna.surrogate.paper import PaperModel

        return PaperModel
    raise ValueError(f'mode must be "bayesian" or "paper", got {mode!r}.')
