from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.surrogate.features import (
    MLP,
    feature_groups,
    layer_features,
    mlp_inputs,
    ordinary_features,
    series_contrasts,
)
from rankadaptor_optuna.surrogate.grid import RankGrid

SPACE = RankSpace(9, (2, 4, 8), "uniform:5", layers=[2, 4, 6], costs=[10, 20, 30], profile=[0.1, 0.2, 0.6])
GRID = RankGrid.from_space(SPACE)
RANKS = np.asarray([[2.0, 4, 8], [8, 4, 2]])


@pytest.fixture
def mlp():
    rng = np.random.default_rng(0)
    sizes = [(3, 5), (5, 5), (5, 4)]
    return MLP([rng.standard_normal(s) for s in sizes], [rng.standard_normal(s[1]) for s in sizes])


def test_a_single_candidate_does_not_divide_by_zero():
    assert np.isfinite(layer_features(RankGrid.from_space(RankSpace(1, (8,))), np.asarray([[8.0]]), None)).all()


def test_a_layers_features_depend_on_its_own_rank_alone(mlp):
    changed = RANKS.copy()
    changed[:, 1] = 8
    before, after = layer_features(GRID, RANKS, mlp), layer_features(GRID, changed, mlp)
    assert (before[:, [0, 2]] == after[:, [0, 2]]).all()
    assert (before[:, 1] != after[:, 1]).any(1).all()


def test_groups_name_every_column_once(mlp):
    for network in (None, mlp):
        columns = feature_groups(GRID, network)
        covered = np.concatenate([np.arange(s.start, s.stop) for s in columns.values()])
        assert covered.tolist() == list(range(layer_features(GRID, RANKS, network).shape[2]))
    assert columns["mlp"].stop - columns["mlp"].start == mlp.n_features == 4
    assert columns["difference"].stop == columns["difference"].start
    assert columns["residual"].stop - columns["residual"].start == 3


def two_series(n, mlp=None):
    """Features of each rank's largest candidate in n layers of two series, without 1/sqrt(2 n)."""
    grid = RankGrid.from_space(RankSpace(n, (2, 8), profile=np.linspace(0, 1, 2 * n) ** 2, granularity="sublayer"))
    return layer_features(grid, np.full((1, 2 * n), 8.0), mlp)[0] * np.sqrt(2 * n), feature_groups(grid, mlp)


def test_series_share_one_function_of_depth_and_differ_by_another(mlp):
    features, columns = two_series(5, mlp)
    assert columns["mlp"].stop == features.shape[1]
    shared = features[:, : columns["ends"].stop]
    sign = np.asarray([1, -1] * 5)[:, None]
    assert features[:, columns["difference"]] == pytest.approx(sign * shared)
    assert features[::2, columns["smooth"]] == pytest.approx(features[1::2, columns["smooth"]])


def test_each_series_is_judged_by_its_own_profile():
    features, columns = two_series(5)
    linear = features[:, columns["profile"]][:, 0]
    for part in (linear[::2], linear[1::2]):
        assert part.mean() == pytest.approx(0)
        assert part.std() == pytest.approx(1)


@pytest.mark.parametrize("n", range(1, 8))
def test_contrasts_treat_all_series_alike(n):
    found = series_contrasts(n)
    assert found.shape == (n, n - 1)
    assert found.sum(0) == pytest.approx(np.zeros(n - 1))
    similarity = found @ found.T
    assert np.diag(similarity) == pytest.approx(np.full(n, min(1, n - 1)))
    assert len({round(x, 9) for x in similarity[~np.eye(n, dtype=bool)]}) <= 1


@pytest.mark.parametrize(("group", "power"), [("residual", 1), ("residual curvature", 2)])
def test_the_residual_groups_tell_the_layers_apart(group, power):
    residual = layer_features(GRID, RANKS, None)[:, :, feature_groups(GRID, None)[group]]
    assert residual == pytest.approx(GRID.scaled(RANKS)[:, :, None] ** power * np.eye(3) / np.sqrt(3))


def test_features_at_a_depth_are_the_same_in_models_of_any_number_of_layers(mlp):
    """Up to residuals and ends, which are of single layers, and 1/sqrt(layers), which keeps the sum's scale."""
    deep = RankGrid.from_space(RankSpace(17, (2, 4, 8), "uniform:5"))
    shallow = RankGrid.from_space(RankSpace(9, (2, 4, 8), "uniform:5"))

    def shared(grid):
        features = layer_features(grid, np.full((1, grid.n_layers), 8.0), mlp)[0] * np.sqrt(grid.n_layers)
        columns = feature_groups(grid, mlp)
        return np.delete(features, np.r_[columns["ends"], columns["residual"], columns["residual curvature"]], axis=1)

    assert shared(deep)[::2] == pytest.approx(shared(shallow))


@pytest.mark.parametrize("n", [2, 9, 40])
def test_the_ends_reach_equally_many_layers_in_models_of_any_number_of_layers(n):
    grid = RankGrid.from_space(RankSpace(n, (2, 8)))
    ends = layer_features(grid, np.full((1, n), 8.0), None)[0][:, feature_groups(grid, None)["ends"]] * np.sqrt(n)
    assert ends[:2, 0] == pytest.approx([1, np.exp(-1)])
    assert ends[::-1] == pytest.approx(ends[:, ::-1])


def test_each_series_has_ends_of_its_own():
    features, columns = two_series(5)
    assert features[[0, 1], columns["ends"].start] == pytest.approx([1, 1])
    assert features[[8, 9], columns["ends"].stop - 1] == pytest.approx([1, 1])


def test_the_mlp_is_told_rank_depth_and_standardised_profile():
    rank, depth, profile = mlp_inputs(GRID, RANKS)[0].T
    assert rank == pytest.approx(GRID.scaled(RANKS)[0])
    assert depth == pytest.approx(GRID.depth)
    assert profile.mean() == pytest.approx(0)
    assert profile.std() == pytest.approx(1)
    assert profile.argmax() == 2


def test_an_even_profile_is_standardised_to_zeros():
    grid = RankGrid.from_space(RankSpace(3, profile=[0.3, 0.3, 0.3]))
    assert (mlp_inputs(grid, np.ones((1, 3)))[..., 2] == 0).all()


def test_the_mlp_computes_what_torch_computes(mlp):
    inputs = np.random.default_rng(1).standard_normal((2, 3, 3))
    hidden = torch.from_numpy(inputs)
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        hidden = torch.nn.functional.linear(hidden, torch.from_numpy(weight.T), torch.from_numpy(bias))
        hidden = torch.tanh(hidden) if i < 2 else hidden
    assert mlp(inputs) == pytest.approx(hidden.numpy())


def test_ordinary_features_are_the_same_whoever_computes_them():
    points = np.random.default_rng(0).random((4, 3))
    features = ordinary_features(points)
    assert features.shape == (4, 2 * 3 + 64)
    assert (features == ordinary_features(points.copy())).all()
    assert features[1:2] == pytest.approx(ordinary_features(points[1:2]))
    assert ordinary_features(np.zeros((4, 0))).shape == (4, 0)


def test_ordinary_features_approximate_an_rbf_kernel():
    a, b = np.random.default_rng(0).random((2, 50, 2))
    found = (ordinary_features(a, 4096)[:, 4:] * ordinary_features(b, 4096)[:, 4:]).sum(1)
    kernel = np.exp(-((a - b) ** 2).sum(1) / (2 * 0.3**2))
    assert np.abs(found - kernel).max() < 0.1


def test_sensitivities_are_relative_to_their_mean_and_negative_ones_count_as_none(mlp):
    grid = replace(GRID, sensitivity=np.asarray([1.0, 4.0, -9.0]))
    sensitivity = np.asarray([3 / 9 - 1, 3 * 8 / 9 - 1, -1])
    columns = feature_groups(grid, mlp)
    t, features = grid.scaled(RANKS), layer_features(grid, RANKS, mlp) * np.sqrt(3)
    assert features.shape[2] == columns["mlp"].stop
    expected = np.stack([t * sensitivity, t**2 * sensitivity], axis=2)
    assert features[:, :, columns["sensitivity"]] == pytest.approx(expected)
    again = layer_features(replace(GRID, sensitivity=10 * grid.sensitivity), RANKS, mlp) * np.sqrt(3)
    assert again == pytest.approx(features)


@pytest.mark.parametrize("sensitivity", [[0.0, 0, 0], [-1.0, 0, -2], [3.0, 3, 3]])
def test_a_constant_sensitivity_adds_no_features(mlp, sensitivity):
    grid = replace(GRID, sensitivity=np.asarray(sensitivity))
    assert feature_groups(grid, mlp) == feature_groups(GRID, mlp)
    np.testing.assert_array_equal(layer_features(grid, RANKS, mlp), layer_features(GRID, RANKS, mlp))


def test_the_mlp_does_not_see_the_sensitivity(mlp):
    grid = replace(GRID, sensitivity=np.asarray([1.0, 4.0, 9.0]))
    np.testing.assert_array_equal(mlp(mlp_inputs(grid, RANKS)), mlp(mlp_inputs(GRID, RANKS)))
