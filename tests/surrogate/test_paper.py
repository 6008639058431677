from __future__ import annotations

import numpy as np
import pytest
import torch

from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.surrogate.network import Network

SPACE = RankSpace(10, budget="uniform:8")
WEIGHTS = np.linspace(0.2, 2, 10)


def score(ranks):
    return (WEIGHTS * np.log2(1 + np.asarray(ranks))).sum(-1)


def configurations(n, seed=0):
    return np.random.default_rng(seed).choice(SPACE.candidates, (n, 10)).astype(float)


def noise(n, seed=3):
    return np.random.default_rng(seed).standard_normal(n)


def fitted(n=40, *, scores=None, **settings):
    model = PerformanceModel(SPACE, mode="paper", **settings)
    ranks = configurations(n)
    model.update(ranks, score(ranks) if scores is None else scores)
    return model


def predictions(model):
    test = configurations(5, seed=1)
    return np.concatenate([*model.predict(test), *model.predict_gain(test), [model.noise]])


def test_a_known_function_is_learned_online():
    test = configurations(100, seed=1)
    assert np.corrcoef(fitted(100).predict(test)[0], score(test))[0, 1] > 0.9


def test_the_same_seed_and_history_predict_the_same_however_they_are_divided():
    once, steps, ranks = fitted(), PerformanceModel(SPACE, mode="paper"), configurations(40)
    steps.update(ranks[:7], score(ranks[:7]))
    steps.predict(ranks)
    steps.update(ranks[7:39], score(ranks[7:39]))
    steps.update(ranks[39], score(ranks[39]))
    np.testing.assert_array_equal(predictions(steps), predictions(once))
    assert (predictions(fitted(seed=1)) != predictions(once))[:5].all()


def test_torchs_defaults_do_not_matter_and_no_global_random_state_is_used(foreign_torch):
    expected = predictions(fitted())
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    foreign_torch()
    np.testing.assert_array_equal(predictions(fitted()), expected)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_the_standard_deviation_is_wide_before_anything_was_predicted():
    assert PerformanceModel(SPACE, mode="paper").predict([8.0] * 10)[1] == pytest.approx(2)
    assert fitted(2).predict([8.0] * 10)[1] == pytest.approx(2 * score(configurations(2)).std())


def test_the_standard_deviation_covers_scores_that_were_not_trained_on():
    test = configurations(200, seed=1)
    for n in (5, 10, 20, 80):
        mean, std = fitted(n, scores=score(configurations(n)) + noise(n)).predict(test)
        covered = np.mean(np.abs(mean - score(test) - noise(200, seed=4)) < 1.96 * std)
        assert covered > 0.9, n


def test_the_noise_is_that_of_predictions_not_of_the_fit():
    model = fitted(80, scores=noise(80))  # nothing to learn, yet a network can learn it by heart
    fit = np.sqrt(np.mean((model.predict(configurations(80))[0] - noise(80)) ** 2))
    assert fit < 0.9
    assert 1 < model.noise < 1.6


def test_the_noise_falls_as_the_function_is_learned():
    assert fitted(100).noise < 0.6 * fitted(10).noise


def test_predictions_are_in_the_scores_units():
    ranks, test, variance = configurations(40), configurations(5, seed=1), np.arange(40) / 4
    model, other = (PerformanceModel(SPACE, mode="paper") for _ in range(2))
    model.update(ranks, score(ranks), variance=variance)
    other.update(ranks, 1e-4 * score(ranks) + 7, variance=1e-4**2 * variance)
    (mean, std), shifted = model.predict(test), other.predict(test)
    assert (shifted[0] - 7) * 1e4 == pytest.approx(mean, rel=1e-5)
    assert shifted[1] * 1e4 == pytest.approx(std, rel=1e-5)


def test_minimise_mirrors_maximise():
    up, down = fitted(), fitted(direction="minimize", scores=-score(configurations(40)))
    test = configurations(5, seed=1)
    np.testing.assert_array_equal(down.predict(test)[0], -up.predict(test)[0])
    np.testing.assert_array_equal(down.predict_gain(test), up.predict_gain(test))


def test_the_gain_is_the_difference_of_predictions_and_certain_for_uniform_itself():
    model, test = fitted(), configurations(5, seed=1)
    gain, std = model.predict_gain(test)
    assert gain == pytest.approx(model.predict(test)[0] - model.predict([8.0] * 10)[0])
    assert std == pytest.approx(np.full(5, 2**0.5 * model.noise))
    assert np.ravel(model.predict_gain([8.0] * 10)).tolist() == [0, 0]


def test_a_diverged_score_does_not_set_the_scale():
    scores = score(configurations(40))
    calm = fitted().noise
    scores[20] = -1e6
    assert fitted(scores=scores).noise < 3 * calm


def test_an_uncertain_score_counts_less():
    ranks, scores = configurations(40), score(configurations(40))
    scores[-5:] += 20
    misled, told = fitted(scores=scores), PerformanceModel(SPACE, mode="paper")
    told.update(ranks, scores, variance=[0] * 35 + [400] * 5)

    def error(model):
        return np.abs(model.predict(ranks[:35])[0] - scores[:35]).mean()

    assert error(told) < 0.9 * error(misled)
    assert told.noise < 0.9 * misled.noise


def test_other_observations_restart_the_training():
    model, fresh = fitted(), fitted(12)
    model.fit(fresh.features, score(configurations(12)))
    np.testing.assert_array_equal(predictions(model), predictions(fresh))


def test_ordinary_parameters_are_inputs_too():
    rng, ranks = np.random.default_rng(0), configurations(100)
    points = rng.random((100, 2))
    model = PerformanceModel(SPACE, mode="paper", n_ordinary=2)
    model.update(ranks, 10 * points[:, 0], points)
    mean = model.predict([[8.0] * 10] * 2, [[0.1, 0.5], [0.9, 0.5]])[0]
    assert mean[1] > mean[0] + 4


@pytest.mark.parametrize("hidden", [(32, 32), (32, 0, 32), (32, 32.0, 32), 32, "abc", ()])
def test_unknown_hidden_widths_are_refused(hidden):
    with pytest.raises(ValueError, match="hidden must be three positive widths"):
        PerformanceModel(SPACE, mode="paper", hidden=hidden)


@pytest.mark.parametrize("prior", ["some/file", Network(9), Network(10, (32, 16, 32))])
def test_a_prior_of_another_kind_or_shape_is_refused(prior):
    with pytest.raises(ValueError, match=r"prior is (None or what|a network \[\d+, 32, \d+, 32, 1\])"):
        PerformanceModel(SPACE, mode="paper", prior=prior)
