from __future__ import annotations

import numpy as np
import pytest

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.surrogate.grid import RankGrid

SPACE = RankSpace(9, (2, 4, 8), "uniform:5", layers=[2, 4, 6], costs=[10, 20, 30], profile=[0.1, 0.2, 0.6])
GRID = RankGrid.from_space(SPACE)


def test_the_grid_of_a_space_has_its_layers_by_relative_depth():
    assert GRID.n_layers == 3
    assert GRID.depth.tolist() == [0.25, 0.5, 0.75]
    assert GRID.padded_values().tolist() == [[2, 4, 8]] * 3
    assert GRID.costs.tolist() == [10, 20, 30]
    assert GRID.profile.tolist() == [0.1, 0.2, 0.6]
    assert GRID.reference.tolist() == [4, 4, 4]


def test_two_layers_lie_at_the_ends_of_the_depth():
    assert RankGrid.from_space(RankSpace(2)).depth.tolist() == [0, 1]


def test_the_grid_of_sublayers_has_two_series_along_the_same_depth():
    space = RankSpace(
        9,
        (2, 4, 8),
        "uniform:5",
        layers=[2, 6],
        costs=[1, 2, 3, 4],
        profile=[0.1, 0.2, 0.3, 0.4],
        granularity="sublayer",
    )
    grid = RankGrid.from_space(space)
    assert (grid.n_layers, grid.n_series) == (4, 2)
    assert grid.depth.tolist() == [0.25, 0.25, 0.75, 0.75]
    assert grid.series.tolist() == [0, 1, 0, 1]
    assert grid.costs.tolist() == [1, 2, 3, 4]
    assert grid.profile.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert grid.reference.tolist() == [4] * 4


def test_layers_belong_to_one_series_of_unknown_sensitivity_by_default():
    grid = RankGrid(np.zeros(2), [np.ones(1)] * 2, np.zeros(2), np.ones(2), np.ones(2))
    assert (grid.series.tolist(), grid.n_series, grid.sensitivity.tolist()) == ([0, 0], 1, [0, 0])


def test_short_rows_of_candidates_are_padded_with_their_last():
    grid = RankGrid(np.zeros(2), [np.asarray([1.0, 2, 3]), np.asarray([4.0])], np.zeros(2), np.ones(2), np.ones(2))
    assert grid.padded_values().tolist() == [[1, 2, 3], [4, 4, 4]]
    assert (grid.low, grid.high) == (1, 4)


def test_scaled_ranks_span_minus_one_to_one_and_equal_ratios_are_equal_steps():
    grid = RankGrid.from_space(RankSpace(1, (1, 3, 7, 15)))
    assert grid.scaled(np.asarray([1, 3, 7, 15])) == pytest.approx([-1, -1 / 3, 1 / 3, 1])
