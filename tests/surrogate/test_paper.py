from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.priors.paper import pretrain, reptile
from rankadaptor_optuna.surrogate.grid import RankGrid
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


def tasks(n, n_layers=10, n_trials=24):
    """Studies of one kind of model: the deeper layers need rank more, each study on its own scale."""
    grid = RankGrid.from_space(RankSpace(n_layers))
    made = []
    for seed in range(n):
        rng = np.random.default_rng([8, seed])
        ranks = rng.choice(SPACE.candidates, (n_trials, n_layers)).astype(float)
        weights = np.linspace(0.2, 2, n_layers) * rng.uniform(0.5, 1.5, n_layers)
        made.append(MetaTask(grid, ranks, 10.0**seed * (weights * ranks).sum(1)))
    return made


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


def test_training_is_torchs_adam_on_the_papers_network():
    hidden = (32, 16, 32)
    rng = np.random.default_rng(0)
    inputs, targets, weights = rng.standard_normal((16, 10)), rng.standard_normal(16), rng.random(16)
    network, sizes = Network(10, hidden, seed=0), [10, *hidden, 1]
    linears = [torch.nn.Linear(n, m, dtype=torch.float64) for n, m in itertools.pairwise(sizes)]
    reference = torch.nn.Sequential(*[part for linear in linears for part in (linear, torch.nn.ReLU())][:-1])
    start = 0
    for linear in linears:
        n, m = linear.in_features, linear.out_features
        flat = torch.from_numpy(network.parameters[start : start + (n + 1) * m].copy())
        linear.weight.data, linear.bias.data = flat[: n * m].reshape(n, m).T.clone(), flat[n * m :]
        start += (n + 1) * m
    assert start == len(network.parameters)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for _ in range(20):
        network.step(inputs, targets, weights)
        optimizer.zero_grad()
        out = reference(torch.from_numpy(inputs))[:, 0]
        (torch.from_numpy(weights) * (out - torch.from_numpy(targets)) ** 2).mean().backward()
        optimizer.step()
    assert network(inputs) == pytest.approx(reference(torch.from_numpy(inputs))[:, 0].detach().numpy(), abs=1e-9)


def test_the_networks_start_is_torchs_default():
    network = Network(10, seed=0)
    first, second = network.parameters[: 11 * 32], network.parameters[11 * 32 : 11 * 32 + 33 * 32]
    assert np.abs(first).max() == pytest.approx(10**-0.5, rel=0.05)
    assert np.abs(second).max() == pytest.approx(32**-0.5, rel=0.05)


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
    ranks, test = configurations(40), configurations(5, seed=1)
    mean, std = fitted().predict(test)
    shifted = fitted(scores=1e-4 * score(ranks) + 7).predict(test)
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


def test_other_observations_start_it_anew():
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


def test_pretraining_knows_before_the_first_trial_what_its_tasks_had_in_common():
    network = pretrain(tasks(8), steps=800)
    test = configurations(100, seed=1)
    model = PerformanceModel(SPACE, mode="paper", prior=network)
    assert np.corrcoef(model.predict(test)[0], score(test))[0, 1] > 0.8
    assert (network.n_steps, np.abs(network.moments).max()) == (0, 0)  # the optimiser starts afresh
    before = network.parameters.copy()
    model.update(test, -score(test))
    np.testing.assert_array_equal(network.parameters, before)  # the next study starts from it, too
    assert np.corrcoef(model.predict(test)[0], score(test))[0, 1] < 0


def opposed(seed, n_trials=24):
    """A study in which either the first or the last layers need rank, which of them only its trials can tell."""
    rng = np.random.default_rng([9, seed])
    ranks = rng.choice(SPACE.candidates, (n_trials, 10)).astype(float)
    return MetaTask(RankGrid.from_space(SPACE), ranks, (-1) ** seed * (np.linspace(-1, 1, 10) * ranks).sum(1))


def test_reptile_starts_where_few_trials_take_it_far():
    def correlation(network, n_trials=8):
        found = []
        for seed in range(100, 110):
            task = opposed(seed, n_trials + 60)
            model = PerformanceModel(SPACE, mode="paper", prior=network)
            model.update(task.ranks[:n_trials], task.scores[:n_trials])
            found.append(np.corrcoef(model.predict(task.ranks[n_trials:])[0], task.scores[n_trials:])[0, 1])
        return np.mean(found)

    network = reptile([opposed(seed) for seed in range(20)], iterations=250)
    assert correlation(network) > correlation(None) + 0.15
    assert (network.n_steps, np.abs(network.moments).max()) == (0, 0)


@pytest.mark.parametrize("learn", [partial(pretrain, steps=20), partial(reptile, iterations=3)])
def test_pretraining_is_reproducible(learn):
    networks = [learn(tasks(2), seed=seed).parameters for seed in (0, 0, 1)]
    np.testing.assert_array_equal(networks[0], networks[1])
    assert (networks[0] != networks[2]).any()


@pytest.mark.parametrize("learn", [pretrain, reptile])
@pytest.mark.parametrize("given", [[], [*tasks(1), *tasks(1, n_layers=9)], tasks(1, n_trials=0)])
def test_pretraining_needs_tasks_of_one_depth(given, learn):
    with pytest.raises(ValueError, match="meta-learning needs tasks with trials, all of one number of layers"):
        learn(given)
