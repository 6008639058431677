"""BayesianModel: meta-learned features and a closed-form Bayesian head.

Notation, beside that of ``features`` and ``head``:
    r_0     the reference: the uniform configuration
    phi(r)  features of the ranks relative to it, sum over layers of ``layer_features`` at r less those at r_0
    T(r)    total log rank relative to the reference's: the first smooth feature, phi(r)[0]
    z       ordinary parameters in the unit cube, psi(z) their ``ordinary_features``

    score = location + spread * (w_0 + w . phi(r) + c T(r)^2 + v . psi(z)) + noise

A configuration's features are (1, phi(r), T(r)^2, psi(z)). phi and T are sums over layers, T^2 is not: where a table of
values per layer and candidate is needed, its tangent at the total of the best trial replaces it, 2 T_best T - T_best^2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankadaptor_optuna.surrogate.base import ModelBase
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.failures import FailureModel
from rankadaptor_optuna.surrogate.features import MLP, feature_groups, layer_features, ordinary_features
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.head import BayesianHead, Hyperparameters
from rankadaptor_optuna.surrogate.hyperparameters import (
    failure_priors,
    hyperparameter_points,
    middle_hyperparameters,
    with_cost,
)
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.statistics import Standardised, standardise

if TYPE_CHECKING:
    from rankadaptor_optuna.space import RankSpace

# Variance that a seed's recoveries do not share with other seeds', as a share of the variance that they do share.
# Chosen by `python -m benchmarks.calibration`: the 95% interval of the gain predicted after 25 trials of the race's
# searches held 98% of the gains measured on fresh seeds, without it 32%.
_APART = 1 / 3
# Standard deviation of the misfit of a bad score, as a share of its distance below the median. Chosen on families of
# recoveries that are not in the tables of `python -m benchmarks.transfer`.
_MISFIT = 0.3
# Standard deviations taken off a gain before configurations are compared: the best of many predictions errs upwards.
# On five families of recoveries and 18 simulated tasks, none of them in the tables of `python -m benchmarks.race`, the
# regret of recommendations fell or stayed.
_CAUTION = 0.5


class BayesianModel(ModelBase):
    """Meta-learned MLP features and a closed-form Bayesian head (in the role of the paper's section 3.2).

    The score is modelled as a sum over layers. Each layer's part has a component that is smooth along the depth, its
    curvature in rank, a component that follows the layer profile, one that follows the layers' sensitivities where they
    are known, one for the first and the last layers, which stand out, a free residual with a curvature of its own, and
    the features of the meta-learned MLP. The square of the total (log) rank is added to the sum: the less total rank
    there is, the more each rank is worth. The posterior is exact; nothing is drawn at random but by ``sample``.

    Args:
        space: The rank space (or a ``RankGrid`` of searched layers).
        prior: The meta-learned prior, or None.
        direction: ``"maximize"`` or ``"minimize"``: whether higher or lower scores are better.
        n_ordinary: Width of the ordinary parameters' points, 0 where only ranks are searched.

    Raises:
        ValueError: The direction is unknown.
    """

    mode = "bayesian"

    def __init__(
        self, space: RankSpace | RankGrid, *, prior: Prior | None, direction: str = "maximize", n_ordinary: int = 0
    ) -> None:
        self._prior = prior
        super().__init__(space, direction=direction, n_ordinary=n_ordinary)

    @property
    def _mlp(self) -> MLP | None:
        return None if self._prior is None else self._prior.mlp

    @cached_property
    def _reference(self) -> Array:
        """Features of the uniform configuration by layer, (L, F)."""
        return layer_features(self.grid, self.grid.reference[None], self._mlp)[0]

    @cached_property
    def _of_candidates(self) -> Array:
        """Features of each candidate in each layer relative to the uniform configuration's, (C, L, F)."""
        return layer_features(self.grid, self.grid.padded_values().T, self._mlp) - self._reference

    @cached_property
    def _n_rank_features(self) -> int:
        return feature_groups(self.grid, self._mlp)["mlp"].stop

    @cached_property
    def n_features(self) -> int:
        """Number of features of a configuration, F."""
        return 2 + self._n_rank_features + ordinary_features(np.zeros((1, self._n_ordinary))).shape[1]

    def _encode(self, ranks: Array, points: Array) -> Array:
        of_ranks = (layer_features(self.grid, ranks, self._mlp) - self._reference).sum(1)
        total = of_ranks[:, :1]
        return np.concatenate([np.ones((len(ranks), 1)), of_ranks, total**2, ordinary_features(points)], axis=1)

    def encode_with_cost(self, ranks: ArrayLike, points: ArrayLike | None = None) -> Array:
        """Returns the features of configurations and, last, their total cost relative to uniform, (n, F + 1).

        Failures and constraints often depend on memory or time, which are linear in the ranks.
        """
        features = self.encode(ranks, points)
        return np.concatenate([features, self._costs(np.atleast_2d(ranks)).sum(1, keepdims=True)], axis=1)

    def _costs(self, ranks: Array) -> Array:
        """Cost of ranks (n, L) relative to the uniform configuration, on the scale of ``layer_features``, (n, L)."""
        grid = self.grid
        scale = 2 / max(grid.high - grid.low, 1e-9) / np.sqrt(max(1, grid.n_layers))
        costs: Array = (ranks - grid.reference) * scale * grid.costs / (grid.costs.mean() if grid.n_layers else 1)
        return costs

    def fit(self, features: Array, scores: Array, variance: Array | None = None) -> None:
        """Replaces all observations: features as ``encode`` returns them, (n, F), scores and their variances, (n,).

        An observation may also be a sum of others with weights that add up to 0, in features and score alike (a
        difference of scores has no intercept and says nothing about the level of scores).
        """
        super().fit(features, scores, variance)
        for stale in ("_head", "_standardised"):
            self.__dict__.pop(stale, None)

    @property
    def _is_whole(self) -> NDArray[np.bool_]:
        """Whether each observation is the score of a configuration, not a difference of scores, (n,)."""
        whole: NDArray[np.bool_] = self.features[:, 0] > 0.5
        return whole

    @cached_property
    def _standardised(self) -> Standardised:
        """The scores standardised within the study; differences of scores, which have no level, are scaled only.

        A sum over layers holds within a range of scores at best, and the range near the best scores matters. So the
        further a score is below the median, the larger its extra variance: bad trials must not bend the model where
        the optimum is.
        """
        whole = self._is_whole
        of_whole = standardise(self._scores[whole])
        targets, doubt = self._scores / of_whole.spread, np.zeros(len(whole))
        median = np.median(of_whole.targets) if whole.any() else 0.0
        below = np.maximum(median - of_whole.targets, 0)
        targets[whole], doubt[whole] = of_whole.targets, of_whole.doubt + (_MISFIT * below) ** 2
        return of_whole._replace(targets=targets, doubt=doubt)

    @cached_property
    def _head(self) -> BayesianHead:
        return BayesianHead(self.features, self.targets, self._hyperparameters, self.extra_variance)

    @property
    def extra_variance(self) -> Array:
        """Variance of each target beyond the common noise, (n,): its own, and that of bad scores' misfit."""
        return self._variance / self.spread**2 + self._standardised.doubt

    @cached_property
    def _hyperparameters(self) -> list[Hyperparameters]:
        return hyperparameter_points(self.grid, self._prior, self.n_features)

    def middle_hyperparameters(self) -> Hyperparameters:
        """Returns the point of the grid that meta-learning assumes for the features that are not learned."""
        return middle_hyperparameters(self.grid, self.n_features)

    @property
    def noise(self) -> float:
        """Estimated standard deviation of a trial's score about its expectation, in score units."""
        return self.spread * self._head.noise

    def predict(self, ranks: ArrayLike, points: ArrayLike | None = None) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the score without trial noise, each (n,), in score units."""
        mean, std = self._head.predict(self.encode(ranks, points))
        return self._sign * (self._standardised.location + self.spread * mean), self.spread * std

    def predict_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the gain over the uniform configuration, each (n,), in score units.

        Positive is better, whatever the direction. The uncertainty that all configurations share cancels, so the
        interval is narrower than that of the difference of two independent predictions.
        """
        return self.predict_difference(self.encode(ranks), self.encode(self.grid.reference))

    def predict_lasting_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Returns the same as ``predict_gain`` for the part of the gain that lasts on other seeds and other text.

        All trials of a study share a seed, and a part of their differences is that seed's alone, which no number of
        them can tell apart. Its variance is assumed to be a third of that of the lasting part.
        """
        mean, std = self._head.predict_shared(self.encode(ranks) - self.encode(self.grid.reference), _APART)
        return self.spread * mean, self.spread * std

    def predict_difference(self, features: Array, others: Array) -> tuple[Array, Array]:
        """Returns the same as ``predict_gain`` for configurations over others, both as ``encode`` returns them."""
        mean, std = self._head.predict(features - others)
        return self.spread * mean, self.spread * std

    def lower_bound(self, difference: Array) -> tuple[float, Belief]:
        """Returns a lower bound of a configuration's gain over another: its mean less half a standard deviation.

        Args:
            difference: Difference of the two configurations' features, as ``encode`` returns them, (F,).

        Returns:
            The bound in standardised score units, and a linear function of the features that touches it from above: it
            equals the bound at ``difference`` and is nowhere below the bound of another difference.
        """
        covariance = self._head.covariance_with(difference)
        std = float(np.sqrt(np.maximum(difference @ covariance, 0)))
        weights = self._head.mean - _CAUTION * covariance / (std or 1.0)  # tangent of mean . d - _CAUTION sqrt(d'Cd)
        return float(weights @ difference), self._belief(weights)

    def constraint(self, features: Array, values: Array) -> Belief:
        """Returns the posterior mean of a constraint's values (n,); positive is broken.

        Features are those of ``encode_with_cost``, (n, F + 1).
        Values are scaled but not centred, and expected to have no trend in rank. Under Thompson draws of a constraint,
        proposals broke it twice as often as under its mean, at no better score (60 simulated worlds of 12 layers).
        """
        scale = float(np.sqrt(np.mean(values**2))) or 1.0
        points = hyperparameter_points(self.grid, self._prior, self.n_features, trend=0)
        return self.belief_with_cost(BayesianHead(features, values / scale, [with_cost(p) for p in points]).mean)

    def failures(self, features: Array, failed: NDArray[np.bool_], log_odds: float = 0.0) -> FailureModel:
        """Returns the model of failures, fitted to whether each trial failed, (n,).

        Features are those of ``encode_with_cost``, (n, F + 1); ``log_odds`` as in ``FailureModel``.
        """
        return FailureModel(features, failed, failure_priors(self.grid, self.n_features), log_odds)

    def belief_with_cost(self, weights: Array, offset: float = 0.0) -> Belief:
        """Returns a linear function of the features and the cost, weights (F + 1,) and offset, as tables."""
        belief = self._belief(weights[:-1])
        costs = self._costs(self.grid.padded_values().T).T if self.grid.n_layers else 0.0
        return replace(belief, table=belief.table + weights[-1] * costs, offset=belief.offset + offset)

    def sample(self, rng: np.random.Generator) -> Belief:
        """Returns a Thompson draw from the posterior (from the prior where no trial has finished)."""
        return self._belief(self._head.sample(rng))

    def mean(self) -> Belief:
        """Returns the posterior mean."""
        return self._belief(self._head.mean)

    def _belief(self, weights: Array) -> Belief:
        """Returns the function with these weights; the squared total is replaced by its tangent at the best trial."""
        of_ranks, square, rest = np.split(weights[1:], [self._n_rank_features, self._n_rank_features + 1])
        if self.grid.n_layers == 0:
            return Belief(np.zeros((0, 1)), rest, float(weights[0]))
        total = self._total_of_best
        features = self._of_candidates
        table = (features @ of_ranks + 2 * square * total * features[:, :, 0]).T
        return Belief(table, rest, float(weights[0] - square[0] * total**2))

    @property
    def _total_of_best(self) -> float:
        """Total (log) rank T of the configuration with the best score; 0, that of uniform, without one."""
        whole = np.flatnonzero(self._is_whole)
        return float(self.features[whole[self._scores[whole].argmax()], 1]) if len(whole) else 0.0

    @property
    def tensors(self) -> dict[str, Array]:
        """The arrays on which predictions and further updates rest, by name, for a file."""
        prior = {} if self._prior is None else self._prior.tensors
        return {**super().tensors, **{f"prior.{name}": value for name, value in prior.items()}}
