from __future__ import annotations

import itertools

import numpy as np
import pytest

from rankadaptor_optuna.surrogate.allocations import Allocations, Points, keeps, within_constraints
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.features import ordinary_features
from rankadaptor_optuna.surrogate.grid import RankGrid


def feasible_totals(values, costs, budget):
    """Returns every feasible choice and its total value."""
    rows = np.arange(len(values))
    choices = np.asarray([*itertools.product(range(values.shape[1]), repeat=len(values))])
    fits = (costs[rows, choices].sum(1) <= budget) & np.isfinite(values[rows, choices]).all(1)
    return choices[fits], values[rows, choices[fits]].sum(1)


def table(seed):
    """Returns values, costs and budget of a few layers; some candidates are not allowed."""
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 6)), int(rng.integers(2, 5))
    values = rng.standard_normal((n, width))
    values[:, 1:][rng.random((n, width - 1)) < 0.1] = -np.inf
    costs = np.sort(rng.integers(0, 9, width)) * rng.integers(1, 20, (n, 1))
    return values, costs, rng.uniform(costs[:, 0].sum(), costs[:, -1].sum())


def allocations_of(values, costs, budget=np.inf):
    return Allocations(costs, costs, np.isfinite(values), budget)


def uneven_grid():
    """Returns a grid whose layers have different candidates and costs."""
    values = [np.asarray([1.0, 2, 3]), np.asarray([4.0]), np.asarray([2.0, 8])]
    return RankGrid(np.asarray([0, 0.5, 1]), values, np.zeros(3), np.asarray([1.0, 10, 2]), np.ones(3))


def test_a_layer_takes_only_its_own_candidates():
    allocations, table = Allocations.of(uneven_grid()), np.arange(9.0).reshape(3, 3)
    possible = set(itertools.product((1, 2, 3), (4,), (2, 8)))
    assert allocations.ranks_of(allocations.best(table)) == (3, 4, 8)
    seen, rng = set(), np.random.default_rng(0)
    for _ in possible:
        choice = allocations.best_unseen(table, seen.__contains__, rng)
        assert (choice < [3, 1, 2]).all()  # no padding of short rows
        seen.add(allocations.ranks_of(choice))
    assert seen == possible
    assert {allocations.ranks_of(choice) for choice in allocations.best_few(table, 9)} == possible


def test_layers_of_given_rank_take_their_cost_from_the_budget():
    table = np.ones((3, 1)) * np.arange(3)
    # the given rank, no candidate, costs 5, and the only candidate of the next layer 40: 12 of 57 are left
    allocations = Allocations.of(uneven_grid(), 57, given={0: 5})
    assert allocations.ranks_of(allocations.best(table)) == (5, 4, 2)
    allocations = Allocations.of(uneven_grid(), 61, given={0: 5})
    assert allocations.ranks_of(allocations.best(table)) == (5, 4, 8)


def test_a_budget_below_the_cheapest_configuration_is_raised_to_its_cost():
    allocations = Allocations.of(uneven_grid(), 3)
    assert allocations.budget == 1 + 40 + 4
    assert allocations.ranks_of(allocations.best(np.ones((3, 1)) * np.arange(3))) == (1, 4, 2)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_few_are_the_best_there_are(seed):
    values, costs, budget = table(seed)
    choices, totals = feasible_totals(values, costs, budget)
    few = allocations_of(values, costs, budget).best_few(values, 3)
    rows = np.arange(len(values))
    assert len({tuple(choice) for choice in few}) == len(few) == min(3, len(choices))
    assert all(costs[rows, choice].sum() <= budget for choice in few)
    found = [values[rows, choice].sum() for choice in few]
    assert found == pytest.approx(np.sort(totals)[::-1][:3])


def test_the_best_few_are_accepted_ones():
    values, costs, budget = table(4)
    best = allocations_of(values, costs, budget).best_few(values, 1)[0]
    few = allocations_of(values, costs, budget).best_few(values, 2, lambda choice: tuple(choice) != tuple(best))
    assert few
    assert tuple(best) not in {tuple(choice) for choice in few}
    assert allocations_of(values, costs, budget).best_few(values, 2, lambda choice: False) == []


@pytest.mark.parametrize("seed", range(10))
def test_constraints_are_kept_with_the_least_penalty(seed):
    rng = np.random.default_rng(seed)
    values, burden = rng.standard_normal((2, 5, 4))
    nothing, costs = Points(np.zeros((1, 0)), np.zeros((1, 0))), np.ones((5, 4))
    choices, totals = feasible_totals(values, costs, np.inf)
    burdens = burden[np.arange(5), choices].sum(1)
    limit = Belief(burden, np.zeros(0), -float(np.quantile(burdens, 0.3)))
    belief = Belief(values, np.zeros(0))
    allocations = allocations_of(values, costs, np.inf)
    penalised, _, point = within_constraints(belief, [limit], allocations, lambda belief: nothing)
    choice = allocations.best(penalised.table)
    total = values[np.arange(5), choice].sum()
    assert keeps([limit], choice, point)
    assert not keeps([limit], choice, point, margin=10.0)
    feasible = totals[burdens + limit.offset <= 0]
    assert total > np.quantile(feasible, 0.97)


def test_a_constraint_that_the_optimum_keeps_changes_nothing():
    values = np.random.default_rng(0).standard_normal((5, 4))
    belief, slack = Belief(values, np.zeros(0)), Belief(np.ones((5, 4)), np.zeros(0), -100.0)
    allocations = allocations_of(values, np.ones((5, 4)), np.inf)
    nothing = Points(np.zeros((1, 0)), np.zeros((1, 0)))
    assert (within_constraints(belief, [slack], allocations, lambda _: nothing)[0].table == values).all()


def linear(table, slope, offset=0.0):
    """A belief linear in the one ordinary parameter, whose first feature is 2 x - 1."""
    weights = np.zeros(ordinary_features(np.zeros((1, 1))).shape[1])
    weights[0] = slope
    return Belief(table, weights, offset)


def test_a_point_at_the_boundary_is_found_where_score_and_constraint_are_linear_in_it():
    x = np.linspace(0, 1, 101)[:, None]
    points = Points(x, ordinary_features(x))
    table, costs = np.asarray([[0.0, 1.0]] * 3), np.ones((3, 2))
    limit = linear(np.zeros((3, 2)), 1.0)  # x at most 0.5
    _, choice, point = within_constraints(linear(table, 5.0), [limit], allocations_of(table, costs), lambda _: points)
    assert choice.tolist() == [1, 1, 1]
    assert point == pytest.approx([0.5])
    limit = linear(table, 1.0, -0.5)  # each rank takes a step of x, worth ten times as much
    _, choice, point = within_constraints(linear(table, 10.0), [limit], allocations_of(table, costs), lambda _: points)
    assert choice.tolist() == [0, 0, 0]
    assert point == pytest.approx([0.75])


def test_where_nothing_keeps_a_constraint_the_least_broken_is_returned():
    x = np.linspace(0, 1, 11)[:, None]
    points = Points(x, ordinary_features(x))
    table = np.asarray([[0.0, 1.0]] * 3)
    limit = linear(table, 1.0, 5.0)
    found = within_constraints(linear(table, 5.0), [limit], allocations_of(table, np.ones((3, 2))), lambda _: points)
    assert found[1].tolist() == [0, 0, 0]
    assert found[2] == pytest.approx([0.0])
