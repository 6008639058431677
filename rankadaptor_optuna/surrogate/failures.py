"""FailureModel: the probability that the trial of a configuration fails, on the features of the performance model.

Notation: X features, (n, F); t outcomes, 1 for a failed trial, else 0, (n,); w weights, (F,); s standard deviations of
the weights' prior, (F,); A = X diag(s); u = w / s.

    P(failure | x) = sigmoid(x . w)        w ~ N(0, diag(s^2))

The mode of u is found by Newton's method, and the evidence of each prior by Laplace's approximation (Bishop, Pattern
Recognition and Machine Learning, 2006, equations 4.137 and 4.143). As in ``head``, the modes are mixed by evidence. One
prior allows hardly any weights: it says that failures are random, and gains the upper hand where they are.

With v the variance of x . w by Laplace's approximation, the probability that allows for uncertain weights is (Bishop,
equations 4.153 and 4.154)

    P(failure | x) = sigmoid(x . w / sqrt(1 + pi v / 8))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.grid import Array

_NEWTON_STEPS = 12  # enough for a change of the log posterior below _TOLERANCE in all cases tried; set by hand
_HALVINGS = 10  # of a step that would lower the log posterior; set by hand
_TOLERANCE = 1e-3  # in nats; set by hand
_JITTER = 1e-9  # added to the kernel's diagonal for its Cholesky factor
_MAX_LOGIT = 30.0  # beyond, probabilities are 0 or 1 in double precision


class FailureModel:
    """Bayesian logistic regression of failures, its priors weighted by evidence.

    Args:
        features: Features of configurations, (n, F).
        failed: Whether the trial of each failed, (n,).
        priors: Standard deviations of the weights, (F,) each.
        log_odds: Added to all logits where the trials are a sample: log of the share of good trials kept over that of
            failed trials kept (King & Zeng, 2001, Political Analysis 9(2), equation 7). The first feature is 1.

    Attributes:
        weights: Mean of the modes over the priors, (F,).
    """

    def __init__(
        self, features: Array, failed: NDArray[np.bool_], priors: Sequence[Array], log_odds: float = 0.0
    ) -> None:
        fits = [_fit(features, failed.astype(np.float64), std) for std in priors]
        shift = log_odds * np.eye(features.shape[1])[0]
        self._fits = [fit._replace(weights=fit.weights + shift) for fit in fits]
        evidence = np.asarray([fit.evidence for fit in self._fits])
        self._probabilities = np.exp(evidence - np.logaddexp.reduce(evidence))
        self.weights: Array = self._probabilities @ np.stack([fit.weights for fit in self._fits])

    def logit(self, features: Array) -> Array:
        """Returns log(P / (1 - P)) of the probability of failing, (n,)."""
        logit: Array = features @ self.weights
        return logit

    def probability(self, features: Array) -> Array:
        """Returns the probability of failing, (n,), which is nearer to one half where little is known."""
        moderated = [
            _sigmoid(features @ fit.weights / np.sqrt(1 + np.pi * fit.variance(features) / 8)) for fit in self._fits
        ]
        probability: Array = self._probabilities @ np.stack(moderated)
        return probability


class _Fit(NamedTuple):
    """The posterior under one prior.

    Attributes:
        evidence: Logarithm of the prior's evidence.
        weights: Mode of the weights, (F,).
        std: Standard deviations of the prior, (F,).
        curvature: Hessian of the negative log posterior in a basis of A's rows, (B, B).
        to_basis: Coordinates in that basis of scaled features, (F, B); None for the scaled features themselves.
    """

    evidence: float
    weights: Array
    std: Array
    curvature: Array
    to_basis: Array | None

    def variance(self, features: Array) -> Array:
        """Returns the variance of features @ w, (n,)."""
        scaled = features * self.std
        inside = scaled if self.to_basis is None else scaled @ self.to_basis
        within = (inside * np.linalg.solve(self.curvature, inside.T).T).sum(1)
        variance: Array = np.maximum((scaled**2).sum(1) - (inside**2).sum(1), 0) + within
        return variance


def _fit(features: Array, outcomes: Array, std: Array) -> _Fit:
    """Returns the posterior under a prior."""
    scaled = features * std
    n, width = scaled.shape
    # any B with B B^T = A A^T has the same evidence: n unknowns instead of F
    kernel = scaled @ scaled.T + _JITTER * np.eye(n) if n < width else None
    basis: Array = scaled if kernel is None else np.asarray(np.linalg.cholesky(kernel), dtype=np.float64)
    mode: Array = np.zeros(basis.shape[1])
    value = -n * float(np.log(2))
    for _ in range(_NEWTON_STEPS):
        probability = _sigmoid(basis @ mode)
        curvature = basis.T @ (basis * (probability * (1 - probability))[:, None]) + np.eye(basis.shape[1])
        step = np.linalg.solve(curvature, basis.T @ (outcomes - probability) - mode)
        for _ in range(_HALVINGS):
            new = _log_posterior(basis, outcomes, mode + step)
            if new >= value:
                break
            step = step / 2
        mode, gained, value = mode + step, new - value, new
        if gained < _TOLERANCE:
            break
    evidence = value - 0.5 * float(np.linalg.slogdet(curvature)[1])
    if kernel is None:
        return _Fit(evidence, std * mode, std, curvature, None)
    to_basis = scaled.T @ np.linalg.solve(kernel, basis)
    return _Fit(evidence, std * (to_basis @ mode), std, curvature, to_basis)


def _log_posterior(basis: Array, outcomes: Array, mode: Array) -> float:
    """Returns the log of likelihood times prior, up to a constant."""
    logits = basis @ mode
    return float(outcomes @ logits - np.logaddexp(0, logits).sum() - 0.5 * mode @ mode)


def _sigmoid(logits: Array) -> Array:
    probability: Array = 1 / (1 + np.exp(-np.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)))
    return probability
