"""The closed-form Bayesian head: linear regression on grouped features, hyperparameters weighted by their evidence.

Adaptive Bayesian linear regression (Perrone et al., 2018, "Scalable Hyperparameter Transfer Learning") over a small
grid of hyperparameters. It does not maximise the marginal likelihood but mixes the grid's points by it: with ten
observations no single point is certain, and a group that does not explain the data (a bad prior, say) fades out.

Notation (RW: Rasmussen & Williams, 2006, "Gaussian Processes for Machine Learning"; one point of the grid unless said
otherwise):
    X       (n, F)  features, one row per observation
    y       (n,)    standardised scores
    v       (n,)    extra variance of each observation's noise
    sigma   scalar  standard deviation of the noise that all observations share
    W       (n, n)  diag(1 / (sigma^2 + v)), precision of the observations
    m, S    (F,), (F, F)  prior mean and covariance of the weights w; S = diag(std^2)
    P       (F, F)  posterior precision, X'WX + S^-1
    u       (F,)    projected residual, X'W(y - Xm)
    L       (F, F)  Cholesky factor, P = L L'
    q       scalar  squared residual, (y - Xm)'W(y - Xm)

Formulas:
    model       y = Xw + noise, w ~ N(m, S), noise ~ N(0, W^-1)
    posterior   w | y ~ N(m + P^-1 u, P^-1)                                     RW 2.8, with a prior mean
    evidence    log p(y) = -1/2 (log|2 pi W^-1| + log|P| + log|S| + q - u'P^-1 u)   RW 2.30, by RW A.9 and A.10
    mixture     mean and variance by the laws of total expectation and total variance

Where there are many more features than observations, the same posterior in terms of the observations is cheaper:
    C           (n, n)  covariance of the scores, XSX' + W^-1                      RW 2.12
    posterior   m + SX'C^-1 (y - Xm), covariance S - SX'C^-1 XS                    RW 2.11
    draw        w + SX'C^-1 (y - Xw - e) with w ~ N(m, S), e ~ N(0, W^-1)          Matheron's rule: Wilson et al. (2020,
                                                                                   arXiv:2002.09309), equation 8
    evidence    log p(y) = -1/2 (log|2 pi C| + (y - Xm)'C^-1 (y - Xm))             RW 2.30
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.grid import Array

_WIDE = 300  # features from which the dual form is faster, where observations are few; set by hand
_NEGLIGIBLE = 1e-4  # share of the evidence below which a point is left out of the mixture; set by hand, for speed


@dataclass(frozen=True)
class Hyperparameters:
    """One point of the grid.

    Attributes:
        mean: Prior mean of each weight, m, (F,).
        std: Prior standard deviation of each weight, (F,).
        noise: Standard deviation of the common noise, sigma.
        log_prior: Logarithm of the point's prior weight in the mixture, up to a constant.
    """

    mean: Array
    std: Array
    noise: float
    log_prior: float = 0.0


class _Statistics(NamedTuple):
    """Sufficient statistics of the observations at one noise level.

    Attributes:
        xx: X'WX, (F, F).
        xy: X'Wy, (F,).
        yy: y'Wy.
        log_noise: log|2 pi W^-1|.
    """

    xx: Array
    xy: Array
    yy: float
    log_noise: float


class BayesianHead:
    """Posterior of y = features @ w + noise, w ~ N(mean, diag(std^2)), mixed over hyperparameters by evidence.

    Args:
        features: Features of the observations, (n, F). With n = 0, the posterior is the prior.
        targets: Standardised scores, (n,).
        grid: Points of the hyperparameter grid.
        extra: Variance of each observation's noise beyond the common one, (n,). Default: zeros.

    Attributes:
        log_evidence: Logarithm of the sum of the points' evidences times their prior weights.
        weights: Weight of each point kept in the mixture, (K,).
        mean: Posterior mean of w, (F,).
        noise: Root of the mixture's mean noise variance.
    """

    def __init__(
        self, features: Array, targets: Array, grid: list[Hyperparameters], extra: Array | None = None
    ) -> None:
        extra = np.zeros(len(targets)) if extra is None else extra
        n, width = features.shape
        form = _Dual if width > _WIDE and 2 * n < width else _Primal
        posterior = form(features, targets, grid, extra)
        evidence = np.asarray([h.log_prior for h in grid]) + posterior.log_evidence
        self.log_evidence = float(np.logaddexp.reduce(evidence))
        weights = np.exp(evidence - self.log_evidence)
        kept = np.flatnonzero(weights > _NEGLIGIBLE)
        self.weights: Array = weights[kept] / weights[kept].sum()
        self._prior_mean = np.stack([grid[g].mean for g in kept])
        self._prior_variance = np.stack([grid[g].std for g in kept]) ** 2
        self._posterior = posterior
        self._mean = posterior.keep(kept)
        self.mean: Array = self.weights @ self._mean
        self.noise = float(np.sqrt(self.weights @ np.asarray([grid[g].noise for g in kept]) ** 2))

    def sample(self, rng: np.random.Generator) -> Array:
        """Returns one draw of the weights, (F,), its hyperparameters drawn by their evidence (Thompson sampling)."""
        return self._posterior.sample(int(rng.choice(len(self.weights), p=self.weights)), rng)

    def covariance_with(self, features: Array) -> Array:
        """Returns the covariance of each weight with features @ w over the mixture, (F,), for one row (F,)."""
        between = self._mean - self.mean
        within = self._posterior.covariance_with(features)
        covariance: Array = self.weights @ (within + between * (between @ features)[:, None])
        return covariance

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Returns mean and standard deviation of features @ w, without noise, over the mixture, each (n,)."""
        return self.predict_shared(features, 0.0)

    def predict_shared(self, features: Array, apart: float) -> tuple[Array, Array]:
        """Returns the same as ``predict`` for the part of the weights that other studies of the same task share.

        The weights are a sum of shared ones and of this study's own ones, whose prior variance is ``apart`` times that
        of the shared ones. Given the sum w ~ N(m, std^2), the shared ones are distributed as N(m + (w - m) / (1 +
        apart), apart std^2 / (1 + apart)^2), by conditioning a Gaussian (RW A.6).
        """
        keep = 1 / (1 + apart)
        means = features @ (self._prior_mean + keep * (self._mean - self._prior_mean)).T
        spreads = self._posterior.variance(features)
        spreads = keep**2 * (spreads + apart * features**2 @ self._prior_variance.T)
        mean = means @ self.weights
        variance = (spreads + means**2) @ self.weights - mean**2
        return mean, np.sqrt(np.maximum(variance, 0))


class _Primal:
    """Posteriors of all points in terms of the weights.

    Attributes:
        log_evidence: log p(y) of each point, (G,).
    """

    def __init__(self, features: Array, targets: Array, grid: list[Hyperparameters], extra: Array) -> None:
        means, std = np.stack([h.mean for h in grid]), np.stack([h.std for h in grid])
        noises = np.asarray([h.noise for h in grid])
        self.log_evidence = np.zeros(len(grid))
        self._factors: list[Array] = [np.zeros(0)] * len(grid)
        self._prior_means = means
        for noise, data in _statistics_by_noise(features, targets, extra, np.unique(noises)):
            at = np.flatnonzero(noises == noise)
            projected = data.xy - means[at] @ data.xx  # u
            found = _bordered_factors(data.xx, projected, std[at])
            self.log_evidence[at] = _log_evidence(data, means[at], std[at], projected, found)
            for g, factor in zip(at, found, strict=True):
                self._factors[g] = factor

    def keep(self, kept: NDArray[np.intp]) -> Array:
        """Drops all points but some, and returns their posterior means, (K, F)."""
        bordered = np.stack([self._factors[g] for g in kept])
        self._factor, self._mean = _posteriors(bordered, self._prior_means[kept])
        self._factors = []
        return self._mean

    @cached_property
    def _inverse(self) -> Array:
        """L^-1 of each point, (K, F, F)."""
        return np.asarray(np.linalg.inv(self._factor), dtype=np.float64)

    def sample(self, g: int, rng: np.random.Generator) -> Array:
        """Returns a draw of the weights from the posterior of a kept point, (F,)."""
        # m + P^-1 u + L^-T z with z ~ N(0, I) has covariance P^-1
        drawn: Array = self._mean[g] + np.linalg.solve(self._factor[g].T, rng.standard_normal(self._mean.shape[1]))
        return drawn

    def covariance_with(self, features: Array) -> Array:
        """Returns P^-1 features of each kept point, (K, F), for one row (F,)."""
        covariance: Array = (self._inverse.transpose(0, 2, 1) @ (self._inverse @ features)[:, :, None])[:, :, 0]
        return covariance

    def variance(self, features: Array) -> Array:
        """Returns the variance of features @ w of each kept point, (n, K)."""
        return np.stack([((features @ inverse.T) ** 2).sum(1) for inverse in self._inverse], axis=1)


class _Dual:
    """The same as ``_Primal`` in terms of the observations."""

    def __init__(self, features: Array, targets: Array, grid: list[Hyperparameters], extra: Array) -> None:
        self._features, self._targets, self._grid, self._extra = features, targets, grid, extra
        self._factors, evidence = [], []
        for h in grid:
            scaled = features * h.std
            factor = np.linalg.cholesky(scaled @ scaled.T + np.diag(h.noise**2 + extra))
            white = np.linalg.solve(factor, targets - features @ h.mean)
            self._factors.append(factor)
            evidence.append(-0.5 * (len(targets) * np.log(2 * np.pi) + white @ white) - np.log(factor.diagonal()).sum())
        self.log_evidence = np.asarray(evidence)

    def keep(self, kept: NDArray[np.intp]) -> Array:
        """Drops all points but some, and returns their posterior means, (K, F)."""
        self._grid, self._factors = [self._grid[g] for g in kept], [self._factors[g] for g in kept]
        return np.stack([self._corrected(g, h.mean, self._targets) for g, h in enumerate(self._grid)])

    def _corrected(self, g: int, weights: Array, targets: Array) -> Array:
        """Returns w + SX'C^-1 (y - Xw), (F,)."""
        factor = self._factors[g]
        white = np.linalg.solve(factor, targets - self._features @ weights)
        corrected: Array = weights + self._grid[g].std ** 2 * (self._features.T @ np.linalg.solve(factor.T, white))
        return corrected

    def sample(self, g: int, rng: np.random.Generator) -> Array:
        """Returns a draw of the weights from the posterior of a kept point, (F,)."""
        point = self._grid[g]
        prior = point.mean + point.std * rng.standard_normal(len(point.std))
        errors = np.sqrt(point.noise**2 + self._extra) * rng.standard_normal(len(self._targets))
        return self._corrected(g, prior, self._targets - errors)

    def covariance_with(self, features: Array) -> Array:
        """Returns (S - SX'C^-1 XS) features of each kept point, (K, F), for one row (F,)."""
        scaled = [point.std**2 * features for point in self._grid]
        return np.stack([self._corrected(g, each, np.zeros(len(self._targets))) for g, each in enumerate(scaled)])

    def variance(self, features: Array) -> Array:
        """Returns the variance of features @ w of each kept point, (n, K)."""
        columns = []
        for point, factor in zip(self._grid, self._factors, strict=True):
            known = np.linalg.solve(factor, (self._features * point.std**2) @ features.T)
            columns.append((features**2) @ point.std**2 - (known**2).sum(0))
        return np.stack(columns, axis=1)


def _statistics_by_noise(
    features: Array, targets: Array, extra: Array, noises: Array
) -> Iterator[tuple[float, _Statistics]]:
    """Yields each noise level with its statistics; observations without extra variance are summed up once for all."""
    plain = extra == 0
    shared = _weighted_sums(features[plain], targets[plain], np.ones(int(plain.sum())))
    for noise in noises:
        variance = noise**2 + extra
        own = _weighted_sums(features[~plain], targets[~plain], 1 / variance[~plain])
        xx, xy, yy = (a / noise**2 + b for a, b in zip(shared, own, strict=True))
        yield noise, _Statistics(xx, xy, yy, np.log(2 * np.pi * variance).sum())


def _weighted_sums(features: Array, targets: Array, precision: Array) -> tuple[Array, Array, float]:
    """Returns X'WX, X'Wy and y'Wy for W = diag(precision)."""
    weighted = features * precision[:, None]
    return weighted.T @ features, weighted.T @ targets, float(precision @ targets**2)


def _bordered_factors(xx: Array, projected: Array, std: Array) -> list[Array]:
    """Returns, for each point, the Cholesky factor of its precision P bordered by its u, (F + 1, F + 1).

    The factor's last row is (L^-1 u)', so one factorisation yields every term of posterior and evidence. The corner of
    the border is infinite, which keeps the matrix positive definite; the factor's corner is not used.
    """
    width = len(xx)
    diagonal = np.arange(width)
    bordered, factors = np.full((width + 1, width + 1), np.inf), []
    for own_projected, own_std in zip(projected, std, strict=True):  # one at a time fits a processor's cache
        bordered[:width, :width], bordered[width, :width] = xx, own_projected
        bordered[diagonal, diagonal] += 1 / own_std**2
        factors.append(np.linalg.cholesky(bordered))
    return factors


def _log_evidence(data: _Statistics, means: Array, std: Array, projected: Array, factors: list[Array]) -> Array:
    """Returns log p(y) of each point, (G,)."""
    residual = data.yy - means @ data.xy - (means * projected).sum(1)  # q
    explained = (np.asarray([factor[-1, :-1] for factor in factors]) ** 2).sum(1)  # u'P^-1 u
    log_det = 2 * np.log([factor.diagonal()[:-1] for factor in factors]).sum(1) + 2 * np.log(std).sum(1)  # |P| |S|
    evidence: Array = -0.5 * (data.log_noise + log_det + (residual - explained))
    return evidence


def _posteriors(factors: Array, prior_means: Array) -> tuple[Array, Array]:
    """Returns Cholesky factor L and mean m + L^-T (L^-1 u) of each point, (K, F, F) and (K, F)."""
    factor = factors[:, :-1, :-1]
    shift = np.linalg.solve(factor.transpose(0, 2, 1), factors[:, -1, :-1, None])
    return factor, prior_means + shift[:, :, 0]
