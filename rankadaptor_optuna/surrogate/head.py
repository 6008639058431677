"""The closed-form Bayesian head: linear regression on grouped features, hyperparameters weighted by evidence.

Adaptive Bayesian linear regression (Perrone et al., 2018) over a small grid of hyperparameters. Instead of one
maximum of the marginal likelihood, the grid's points are mixed by their evidence: with ten observations no single
point is certain, and a group that does not explain the data (a bad prior, say) fades out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankadaptor_optuna.surrogate.features import Array


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
    """

    def __init__(self, features: Array, targets: Array, grid: list[Hyperparameters]) -> None:
        n, width = features.shape
        self._mean = np.stack([h.mean for h in grid])
        std = np.stack([h.std for h in grid])
        noise = np.asarray([h.noise for h in grid])
        gram = features.T @ features
        precision = gram[None] / noise[:, None, None] ** 2
        precision[:, np.arange(width), np.arange(width)] += 1 / std**2
        # precision = factor factor^T; a sample of w is mean + factor^-T z
        self._factor = np.linalg.cholesky(precision)
        residual = targets[None] - self._mean @ features.T
        projected = residual @ features / noise[:, None] ** 2
        half = np.linalg.solve(self._factor, projected[:, :, None])
        self._inverse = np.linalg.inv(self._factor)
        self._mean = self._mean + np.einsum("gji,gj->gi", self._inverse, half[:, :, 0])
        log_det = 2 * np.log(np.diagonal(self._factor, axis1=1, axis2=2)).sum(1) + 2 * np.log(std).sum(1)
        fit = (residual**2).sum(1) / noise**2 - (half[:, :, 0] ** 2).sum(1)
        evidence = -0.5 * (n * np.log(2 * np.pi * noise**2) + log_det + fit)
        evidence = evidence + np.asarray([h.log_prior for h in grid])
        self.log_evidence = float(np.logaddexp.reduce(evidence))
        self.weights = np.exp(evidence - self.log_evidence)
        self.mean: Array = self.weights @ self._mean
        self.noise = float(np.sqrt(self.weights @ noise**2))

    def sample(self, rng: np.random.Generator) -> Array:
        """One draw of the weights, (F,), hyperparameters drawn by their evidence (Thompson sampling)."""
        g = rng.choice(len(self.weights), p=self.weights)
        drawn: Array = self._mean[g] + self._inverse[g].T @ rng.standard_normal(self._mean.shape[1])
        return drawn

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Mean and standard deviation (without noise) of features @ w, each (n,), over the mixture."""
        means = features @ self._mean.T
        spreads = np.stack([((features @ inverse.T) ** 2).sum(1) for inverse in self._inverse], axis=1)
        mean = means @ self.weights
        variance = (spreads + means**2) @ self.weights - mean**2
        return mean, np.sqrt(np.maximum(variance, 0))
