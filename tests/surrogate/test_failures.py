from __future__ import annotations

import numpy as np
import pytest

from rankadaptor_optuna.surrogate.failures import FailureModel

PRIORS = [np.full(4, std) for std in (1e-3, 1.0, 10.0)]


def sample(n, slope, seed=0):
    """Features with an intercept, and failures whose logit is linear in the first of them."""
    rng = np.random.default_rng(seed)
    features = np.concatenate([np.ones((n, 1)), rng.standard_normal((n, 3))], axis=1)
    return features, rng.random(n) < 1 / (1 + np.exp(-slope * features[:, 1]))


@pytest.mark.parametrize("n", [3, 400])
def test_fewer_and_more_trials_than_features_have_the_mode_of_the_posterior(n):
    from scipy.optimize import minimize

    features, failed = sample(n, 2.0)
    std = np.asarray([0.5, 1.0, 2.0, 0.1])

    def negative(w):
        return np.logaddexp(0, features @ w).sum() - failed @ features @ w + 0.5 * ((w / std) ** 2).sum()

    expected = minimize(negative, np.zeros(4), tol=1e-10).x
    assert FailureModel(features, failed, [std]).weights == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("n", [3, 400])
def test_probabilities_allow_for_uncertain_weights(n):
    features, failed = sample(n, 2.0)
    std = np.asarray([0.5, 1.0, 2.0, 0.1])
    model = FailureModel(features, failed, [std])
    fresh, _ = sample(5, 2.0, seed=1)
    p = 1 / (1 + np.exp(-features @ model.weights))
    hessian = features.T @ (features * (p * (1 - p))[:, None]) + np.diag(std**-2.0)
    variance = (fresh * np.linalg.solve(hessian, fresh.T).T).sum(1)
    expected = 1 / (1 + np.exp(-model.logit(fresh) / np.sqrt(1 + np.pi * variance / 8)))
    assert model.probability(fresh) == pytest.approx(expected, abs=2e-3)


def test_probabilities_are_calibrated():
    features, failed = sample(400, 2.0)
    model = FailureModel(features, failed, PRIORS)
    fresh, outcomes = sample(4000, 2.0, seed=1)
    probability = model.probability(fresh)
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)):
        chosen = (probability >= low) & (probability < high)
        assert outcomes[chosen].mean() == pytest.approx(probability[chosen].mean(), abs=0.08)


def test_random_failures_are_not_explained_by_the_configuration():
    features, failed = sample(60, 0.0)
    assert np.ptp(FailureModel(features, failed, PRIORS).probability(features)) < 0.35
    features, failed = sample(60, 5.0)
    assert np.ptp(FailureModel(features, failed, PRIORS).probability(features)) > 0.9


def test_a_sample_of_the_trials_has_the_probabilities_of_all():
    features, _ = sample(4000, 2.0)
    features[:, 1] += 1  # most fail
    failed = np.random.default_rng(1).random(4000) < 1 / (1 + np.exp(-2 * features[:, 1]))
    bad, good = np.flatnonzero(failed), np.flatnonzero(~failed)
    kept = np.concatenate([bad[:300], good[:300]])
    shift = np.log((300 / len(good)) / (300 / len(bad)))
    whole = FailureModel(features, failed, PRIORS).probability(features[:200])
    few = FailureModel(features[kept], failed[kept], PRIORS, shift).probability(features[:200])
    assert np.abs(few - whole).mean() < 0.05
    assert np.abs(FailureModel(features[kept], failed[kept], PRIORS).probability(features[:200]) - whole).mean() > 0.05
