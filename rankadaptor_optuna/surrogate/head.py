"""The closed-form Bayesian head: linear regression on grouped features, hyperparameters weighted by evidence.

Adaptive Bayesian linear regression (Perrone et al., 2018) over a small grid of hyperparameters. Instead of one
maximum of the marginal likelihood, the grid's points are mixed by their evidence: with ten observations no single
point is certain, and a group that does not explain the data (a bad prior, say) fades out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rankadaptor_optuna.surrogate.grid import Array

_NEGLIGIBLE = 1e-4  # weight of a point of the grid that is left out of the mixture


@dataclass(frozen=True)
class Hyperparameters:
    """One point of the grid: prior mean and standard deviation of each weight, and the noise."""

    mean: Array
    std: Array
    noise: float
    log_prior: float = 0.0


class BayesianHead:
    """Posterior of y = features @ w + noise, w ~ N(mean, diag(std^2)), mixed over hyperparameters by evidence.

    Args:
        features: (n, F); n may be 0, then everything is the prior.
        targets: (n,), standardised.
        grid: Hyperparameter points.
        extra: Variance of each target's noise beyond the common one, (n,). Default: none.
    """

    def __init__(
        self, features: Array, targets: Array, grid: list[Hyperparameters], extra: Array | None = None
    ) -> None:
        width = features.shape[1]
        means = np.stack([h.mean for h in grid])
        std = np.stack([h.std for h in grid])
        noises = np.asarray([h.noise for h in grid])
        extra = np.zeros(len(targets)) if extra is None else extra
        # the precision, and below it the projected residual: of that, the factorisation makes all that evidence needs;
        # one after the other, as one fits a processor's cache
        bordered = np.full((width + 1, width + 1), np.inf)
        factors = [bordered] * len(grid)
        log_noise, squares = np.empty(len(grid)), np.empty(len(grid))
        plain = extra == 0
        squared, crossed, own = _statistics(features[plain], targets[plain], np.ones(int(plain.sum())))
        for noise in np.unique(noises):  # what runs over the observations without extra variance is done once
            at = np.flatnonzero(noises == noise)
            variance = noise**2 + extra
            rest = _statistics(features[~plain], targets[~plain], 1 / variance[~plain])
            precision, right = squared / noise**2 + rest[0], crossed / noise**2 + rest[1]
            projections = right - means[at] @ precision
            log_noise[at] = np.log(2 * np.pi * variance).sum()
            squares[at] = own / noise**2 + rest[2] - means[at] @ right - (means[at] * projections).sum(1)
            for g, projected in zip(at, projections, strict=True):
                bordered[:width, :width], bordered[width, :width] = precision, projected
                bordered[np.arange(width), np.arange(width)] += 1 / std[g] ** 2
                factors[g] = np.linalg.cholesky(bordered)
        # precision = factor factor^T; a sample of w is mean + factor^-T z
        log_det = 2 * np.log([factor.diagonal()[:width] for factor in factors]).sum(1) + 2 * np.log(std).sum(1)
        fit = squares - (np.asarray([factor[width, :width] for factor in factors]) ** 2).sum(1)
        evidence = -0.5 * (log_noise + log_det + fit) + np.asarray([h.log_prior for h in grid])
        self.log_evidence = float(np.logaddexp.reduce(evidence))
        weights = np.exp(evidence - self.log_evidence)
        kept = np.flatnonzero(weights > _NEGLIGIBLE)
        self.weights = weights[kept] / weights[kept].sum()
        solved = np.stack([factors[g] for g in kept])
        self._factor = solved[:, :width, :width]
        shift = np.linalg.solve(self._factor.transpose(0, 2, 1), solved[:, width, :width, None])
        self._prior_mean, self._prior_variance = means[kept], std[kept] ** 2
        self._mean = self._prior_mean + shift[:, :, 0]
        self.mean: Array = self.weights @ self._mean
        self.noise = float(np.sqrt(self.weights @ noises[kept] ** 2))

    @cached_property
    def _inverse(self) -> Array:
        inverse: Array = np.linalg.inv(self._factor)
        return inverse

    def sample(self, rng: np.random.Generator) -> Array:
        """One draw of the weights, (F,), hyperparameters drawn by their evidence (Thompson sampling)."""
        g = rng.choice(len(self.weights), p=self.weights)
        drawn: Array = self._mean[g] + np.linalg.solve(self._factor[g].T, rng.standard_normal(self._mean.shape[1]))
        return drawn

    def covariance_with(self, features: Array) -> Array:
        """Covariance of each weight with features @ w, of one row of ``features`` (F,), over the mixture, (F,)."""
        own = self._inverse.transpose(0, 2, 1) @ (self._inverse @ features)[:, :, None]
        apart = self._mean - self.mean
        covariance: Array = self.weights @ (own[:, :, 0] + apart * (apart @ features)[:, None])
        return covariance

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Mean and standard deviation (without noise) of features @ w, each (n,), over the mixture."""
        return self.predict_shared(features, 0.0)

    def predict_shared(self, features: Array, apart: float) -> tuple[Array, Array]:
        """As ``predict``, of what other studies of the same task share with this one.

        The weights are a sum of shared ones and of this study's own, whose prior variance is ``apart`` times the shared
        ones'. Given the sum w ~ N(mean, std^2), the shared ones are N(mean + (w - mean) / (1 + apart), apart std^2 /
        (1 + apart)^2).
        """
        keep = 1 / (1 + apart)
        means = features @ (self._prior_mean + keep * (self._mean - self._prior_mean)).T
        spreads = np.stack([((features @ inverse.T) ** 2).sum(1) for inverse in self._inverse], axis=1)
        spreads = keep**2 * (spreads + apart * features**2 @ self._prior_variance.T)
        mean = means @ self.weights
        variance = (spreads + means**2) @ self.weights - mean**2
        return mean, np.sqrt(np.maximum(variance, 0))


def _statistics(features: Array, targets: Array, weights: Array) -> tuple[Array, Array, float]:
    """All that a linear regression needs of its observations: X'WX, X'Wy and y'Wy."""
    weighted = features * weights[:, None]
    return weighted.T @ features, weighted.T @ targets, float(weights @ targets**2)
