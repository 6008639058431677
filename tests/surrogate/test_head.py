from __future__ import annotations

import numpy as np
import pytest

from rankadaptor_optuna.surrogate import head as module
from rankadaptor_optuna.surrogate.head import BayesianHead, Hyperparameters

RNG = np.random.default_rng(0)
N, F = 7, 4
X, Y, NEW = RNG.standard_normal((N, F)), RNG.standard_normal(N), RNG.standard_normal((5, F))
NARROW = Hyperparameters(np.zeros(F), np.full(F, 0.3), 0.5)
WIDE = Hyperparameters(np.asarray([1.0, 0, -1, 2]), np.asarray([2.0, 0.5, 1, 3]), 0.2)


def joint(h, x, extra=0.0):
    """Mean and covariance of x @ w + noise."""
    return x @ h.mean, (x * h.std**2) @ x.T + (h.noise**2 + extra) * np.eye(len(x))


def log_evidence(h, extra=0.0):
    mean, covariance = joint(h, X, extra)
    off = Y - mean
    return -0.5 * (off @ np.linalg.solve(covariance, off) + np.linalg.slogdet(2 * np.pi * covariance)[1])


def posterior(h, x, extra=0.0):
    """Mean and covariance of x @ w given Y, by conditioning the joint Gaussian."""
    mean, covariance = joint(h, X, extra)
    cross = (x * h.std**2) @ X.T
    found = x @ h.mean + cross @ np.linalg.solve(covariance, Y - mean)
    return found, (x * h.std**2) @ x.T - cross @ np.linalg.solve(covariance, cross.T)


@pytest.mark.parametrize("h", [NARROW, WIDE])
def test_the_posterior_is_that_of_a_gaussian(h):
    head = BayesianHead(X, Y, [h])
    mean, std = head.predict(NEW)
    expected, covariance = posterior(h, NEW)
    assert mean == pytest.approx(expected)
    assert std == pytest.approx(np.sqrt(np.diag(covariance)))
    assert head.mean == pytest.approx(posterior(h, np.eye(F))[0])
    assert head.noise == pytest.approx(h.noise)


@pytest.mark.parametrize("h", [NARROW, WIDE])
def test_the_evidence_is_that_of_a_gaussian(h):
    assert BayesianHead(X, Y, [h]).log_evidence == pytest.approx(log_evidence(h))


def test_hyperparameters_are_mixed_by_their_evidence():
    evidence = np.asarray([log_evidence(NARROW), log_evidence(WIDE)])
    weights = np.exp(evidence - np.logaddexp(*evidence))
    head = BayesianHead(X, Y, [NARROW, WIDE])
    assert head.weights == pytest.approx(weights)
    (a, var_a), (b, var_b) = ((m, np.diag(c)) for m, c in (posterior(NARROW, NEW), posterior(WIDE, NEW)))
    mean = weights @ [a, b]
    found = head.predict(NEW)
    assert found[0] == pytest.approx(mean)
    assert found[1] ** 2 == pytest.approx(weights @ [var_a + (a - mean) ** 2, var_b + (b - mean) ** 2])


def test_a_mixture_with_uncertain_observations_is_that_of_a_plain_computation():
    extra = np.asarray([0, 0.5, 0, 0, 2.0, 0.1, 0])
    grid = [
        Hyperparameters(RNG.standard_normal(F), RNG.uniform(0.3, 2, F), noise, log_prior)
        for noise, log_prior in ((0.5, 0.0), (0.2, -1.0), (0.5, 0.5), (0.2, 0.0))
    ]
    head = BayesianHead(X, Y, grid, extra)
    evidence = np.asarray([log_evidence(h, extra) + h.log_prior for h in grid])
    weights = np.exp(evidence - np.logaddexp.reduce(evidence))
    means, covariances = (np.stack(part) for part in zip(*[posterior(h, np.eye(F), extra) for h in grid], strict=True))
    mean = weights @ means
    apart = means - mean
    covariance = np.einsum("g,gij->ij", weights, covariances + apart[:, :, None] * apart[:, None])
    assert head.log_evidence == pytest.approx(np.logaddexp.reduce(evidence), rel=1e-9)
    assert head.weights == pytest.approx(weights, rel=1e-9)
    assert head.mean == pytest.approx(mean, rel=1e-9)
    assert head.predict(NEW)[1] == pytest.approx(np.sqrt(np.diag(NEW @ covariance @ NEW.T)), rel=1e-9)
    assert head.covariance_with(NEW[0]) == pytest.approx(covariance @ NEW[0], rel=1e-9)
    assert head.noise == pytest.approx(np.sqrt(weights @ [h.noise**2 for h in grid]), rel=1e-9)


def test_a_log_prior_tips_the_mixture():
    doubted = Hyperparameters(WIDE.mean, WIDE.std, WIDE.noise, log_prior=-np.log(9))
    assert BayesianHead(X, Y, [WIDE, doubted]).weights == pytest.approx([0.9, 0.1])


def test_without_observations_everything_is_the_prior():
    head = BayesianHead(np.zeros((0, F)), np.zeros(0), [WIDE])
    mean, std = head.predict(NEW)
    assert head.log_evidence == pytest.approx(0)
    assert head.mean == pytest.approx(WIDE.mean)
    assert mean == pytest.approx(NEW @ WIDE.mean)
    assert std == pytest.approx(np.sqrt((NEW**2) @ WIDE.std**2))


@pytest.mark.parametrize("h", [NARROW, WIDE])
@pytest.mark.parametrize("apart", [0, 0.25, 2])
def test_the_shared_weights_are_those_of_a_conditional_gaussian(h, apart):
    prior = np.diag(h.std**2)
    shared = prior / (1 + apart)
    cross = NEW @ shared @ X.T
    off = Y - X @ h.mean
    covariance = X @ prior @ X.T + h.noise**2 * np.eye(N)
    mean, std = BayesianHead(X, Y, [h]).predict_shared(NEW, apart)
    assert mean == pytest.approx(NEW @ h.mean + cross @ np.linalg.solve(covariance, off))
    variance = NEW @ shared @ NEW.T - cross @ np.linalg.solve(covariance, cross.T)
    assert std == pytest.approx(np.sqrt(np.diag(variance)))


def test_samples_have_the_posteriors_mean_and_covariance():
    head, rng = BayesianHead(X, Y, [WIDE]), np.random.default_rng(1)
    draws = np.stack([head.sample(rng) for _ in range(4000)])
    mean, covariance = posterior(WIDE, np.eye(F))
    scale = np.sqrt(np.diag(covariance))
    assert (np.abs(draws.mean(0) - mean) < 0.1 * scale).all()
    assert (np.abs(np.cov(draws.T) - covariance) < 0.1 * np.outer(scale, scale)).all()


def test_a_hyperparameter_is_sampled_as_often_as_its_weight_says():
    far = Hyperparameters(np.full(F, 1000.0), np.full(F, 1e-3), 0.5, log_prior=np.log(0.25))
    near = Hyperparameters(np.zeros(F), np.full(F, 1e-3), 0.5, log_prior=np.log(0.75))
    head, rng = BayesianHead(np.zeros((0, F)), np.zeros(0), [far, near]), np.random.default_rng(0)
    share = np.mean([head.sample(rng)[0] > 500 for _ in range(1000)])
    assert share == pytest.approx(0.25, abs=0.05)


def test_many_features_of_few_observations_have_the_same_posterior(monkeypatch):
    x, y, extra = X[:, :3].repeat(3, axis=1)[:3], Y[:3], np.asarray([0.0, 0.5, 0.0])
    grid = [
        Hyperparameters(np.linspace(-1, 1, 9), np.linspace(0.1, 2, 9), 0.3),
        Hyperparameters(np.zeros(9), np.full(9, 0.5), 0.9, log_prior=-1.0),
    ]
    primal = BayesianHead(x, y, grid, extra)
    monkeypatch.setattr(module, "_WIDE", 8)
    dual = BayesianHead(x, y, grid, extra)
    new = np.random.default_rng(1).standard_normal((4, 9))
    assert type(primal._posterior) is not type(dual._posterior)
    assert dual.log_evidence == pytest.approx(primal.log_evidence)
    assert dual.weights == pytest.approx(primal.weights)
    assert dual.mean == pytest.approx(primal.mean)
    for apart in (0.0, 1 / 3):
        for found, expected in zip(dual.predict_shared(new, apart), primal.predict_shared(new, apart), strict=True):
            assert found == pytest.approx(expected)
    assert dual.covariance_with(new[0]) == pytest.approx(primal.covariance_with(new[0]))
    rng = np.random.default_rng(0)
    draws = np.stack([dual.sample(rng) for _ in range(4000)]) @ new.T
    mean, std = primal.predict(new)
    assert draws.mean(0) == pytest.approx(mean, abs=0.1)
    assert draws.std(0) == pytest.approx(std, rel=0.05)
