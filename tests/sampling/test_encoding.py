from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.surrogate.grid import RankGrid

RANK = IntDistribution(2, 12, step=2)


def test_series_side_by_side_are_two_functions_of_depth_as_those_of_a_space():
    space = RankSpace(5, granularity="sublayer")
    grid, expected = Encoding(space.distributions()).grid, RankGrid.from_space(space)
    assert grid.n_series == 2
    assert grid.series.tolist() == expected.series.tolist() == [0, 1] * 5
    assert grid.depth.tolist() == expected.depth.tolist()
    assert Encoding({f"r_{i}": RANK for i in range(5)}).grid.n_series == 1


def test_very_many_series_are_told_apart_by_their_residuals_alone():
    names = [f"layer_{i}_rank_{kind}" for i in range(3) for kind in "abcdefgh"]
    assert Encoding(dict.fromkeys(names, RANK)).grid.n_series == 8
    assert Encoding(dict.fromkeys([*names, *(f"layer_{i}_rank_i" for i in range(3))], RANK)).grid.n_series == 1


SPACE = {
    "lr": FloatDistribution(1e-5, 1e-2, log=True),
    "layer_2_rank": RANK,
    "dropout": FloatDistribution(0, 0.3, step=0.1),
    "layer_0_rank": CategoricalDistribution((8, 2, 4)),
    "wd": FloatDistribution(-1.5, 2.5),
    "layer_11_rank": IntDistribution(0, 8, step=8),
    "batch": IntDistribution(1, 128, log=True),
    "steps": IntDistribution(10, 100, step=30),
    "optimizer": CategoricalDistribution(("adam", None, 3, True)),
}


def test_the_grid_follows_the_depth_with_each_layers_own_candidates():
    encoding = Encoding(SPACE)
    assert encoding.rank_names == ["layer_0_rank", "layer_2_rank", "layer_11_rank"]
    assert encoding.grid.depth.tolist() == pytest.approx([0, 2 / 11, 1])
    assert [v.tolist() for v in encoding.grid.values] == [[2, 4, 8], [2, 4, 6, 8, 10, 12], [0, 8]]
    assert encoding.ordinary_names == ["lr", "dropout", "wd", "batch", "steps", "optimizer"]
    assert encoding.width == 5 + 4


def test_every_value_survives_the_unit_cube():
    encoding = Encoding(SPACE)
    values = {
        "lr": [1e-5, 3e-4, 1e-2],
        "dropout": [0.0, 0.1, 0.2, 0.3],
        "wd": [-1.5, 0.25, 2.5],
        "batch": [*range(1, 129)],
        "steps": [10, 40, 70, 100],
        "optimizer": ["adam", None, 3, True],
    }
    for i in range(128):
        params = {name: choices[i % len(choices)] for name, choices in values.items()}
        point = np.asarray(encoding.point(params))
        assert ((point >= 0) & (point <= 1)).all()
        decoded = encoding.ordinary_params(point)
        assert decoded == pytest.approx(params)
        assert [type(v) for v in decoded.values()] == [type(v) for v in params.values()]


def test_every_point_decodes_to_a_value_that_optuna_accepts():
    encoding, rng = Encoding(SPACE), np.random.default_rng(0)
    points = encoding.random_points(300, rng)
    assert points.shape == (300, encoding.width)
    points = np.concatenate([points, encoding.points_near(points[0], 300, rng)])
    for point in points:
        for name, value in encoding.ordinary_params(point).items():
            assert SPACE[name]._contains(SPACE[name].to_internal_repr(value)), (name, value)


def test_random_points_give_every_grid_value_an_equal_share():
    encoding, rng = Encoding({"steps": SPACE["steps"], "x": SPACE["optimizer"]}), np.random.default_rng(0)
    decoded = [encoding.ordinary_params(p) for p in encoding.random_points(2000, rng)]
    for name, choices in (("steps", [10, 40, 70, 100]), ("x", ["adam", None, 3, True])):
        shares = [sum(d[name] is c or d[name] == c for d in decoded) / 2000 for c in choices]
        assert shares == pytest.approx([0.25] * 4, abs=0.04)


def test_points_near_a_good_one_are_nearer_than_random_ones():
    encoding, rng = Encoding(SPACE), np.random.default_rng(0)
    good = encoding.random_points(1, rng)[0]
    near, anywhere = encoding.points_near(good, 200, rng), encoding.random_points(200, rng)
    assert ((near >= 0) & (near <= 1)).all()
    assert np.abs(near - good).sum(1).mean() < 0.5 * np.abs(anywhere - good).sum(1).mean()


def test_points_near_a_good_one_are_jittered_by_a_tenth_and_a_fifth_of_their_categories_redrawn():
    encoding = Encoding({"x": FloatDistribution(0, 1), "kind": CategoricalDistribution("abcd")})
    near = encoding.points_near(np.asarray([0.5, 0, 1, 0, 0]), 4000, np.random.default_rng(0))
    assert near[:, 0].std() == pytest.approx(0.1, rel=0.05)
    assert 1 - near[:, 2].mean() == pytest.approx(0.2 * 3 / 4, rel=0.1)


def test_values_of_an_earlier_range_are_placed_outside_or_nowhere():
    encoding = Encoding({"lr": SPACE["lr"], "optimizer": SPACE["optimizer"]})
    assert 1 < encoding.point({"lr": 1e-1, "optimizer": "sgd"})[0] <= 2
    assert encoding.point({"lr": 0.0, "optimizer": "sgd"}) == [-1, 0, 0, 0, 0]


def test_sensitivities_go_to_the_ranks_of_their_names():
    names = ["r_2", "r_10", "r_0"]
    known = {"r_0": 1.0, "r_2": 2.0, "r_10": 3.0, "another": 4.0}
    encoding = Encoding({**dict.fromkeys(names, RANK), "lr": SPACE["lr"]}, sensitivity=known)
    assert encoding.rank_names == ["r_0", "r_2", "r_10"]
    assert encoding.grid.sensitivity.tolist() == [1, 2, 3]
    assert not encoding.is_like(Encoding(encoding.distributions))


@pytest.mark.parametrize("known", [None, {}, {"r_0": 1.0, "r_1": 2.0}, {"r_0": 1.0, "r_1": 2.0, "r_2": float("nan")}])
def test_sensitivities_of_some_ranks_alone_are_not_heeded(known):
    names = ["r_0", "r_1", "r_2"]
    encoding = Encoding(dict.fromkeys(names, RANK), sensitivity=known)
    assert encoding.grid.sensitivity.tolist() == [0, 0, 0]
    assert encoding.is_like(Encoding(encoding.distributions))
