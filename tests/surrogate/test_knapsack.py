from __future__ import annotations

import itertools

import numpy as np
import pytest

from rankadaptor_optuna.surrogate.knapsack import solve, solve_unseen


def every_choice(values, costs, budget):
    """The feasible choices, and the value of each."""
    rows = np.arange(len(values))
    choices = np.asarray([*itertools.product(range(values.shape[1]), repeat=len(values))])
    fits = (costs[rows, choices].sum(1) <= budget) & np.isfinite(values[rows, choices]).all(1)
    return choices[fits], values[rows, choices[fits]].sum(1)


def seen_in(choices):
    return lambda choice: tuple(choice.tolist()) in choices


def knapsack(seed):
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 6)), int(rng.integers(2, 5))
    values = rng.standard_normal((n, width))
    if seed % 2:  # more rank helps, with diminishing returns
        values = np.cumsum(np.sort(rng.random((n, width)), axis=1)[:, ::-1], axis=1)
    values[:, 1:][rng.random((n, width - 1)) < 0.1] = -np.inf
    costs = np.sort(rng.integers(0, 9, width)) * rng.integers(1, 20, (n, 1))
    return values, costs, rng.uniform(costs[:, 0].sum(), costs[:, -1].sum())


@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in range(0, 200, 50)], ids=str)
def test_solve_finds_the_optimum_of_small_knapsacks_within_the_budget(seeds):
    for seed in seeds:
        values, costs, budget = knapsack(seed)
        choice, rows = solve(values, costs, budget), np.arange(len(values))
        assert costs[rows, choice].sum() <= budget, seed
        assert values[rows, choice].sum() == pytest.approx(every_choice(values, costs, budget)[1].max()), seed


def test_solve_spends_a_deep_models_budget_to_within_one_candidate():
    rng = np.random.default_rng(0)
    for _ in range(5):
        values, costs = np.cumsum(rng.random((40, 6)), axis=1), np.arange(2, 14, 2) * rng.integers(50, 100, (40, 1))
        budget = float(costs[:, 3].sum())
        choice, rows = solve(values, costs, budget), np.arange(40)
        spent = costs[rows, choice].sum()
        assert budget - np.diff(costs, axis=1).min() < spent <= budget


def test_without_a_budget_every_layer_takes_its_best():
    values = np.random.default_rng(0).standard_normal((8, 5))
    assert (solve(values, np.ones((8, 5)), np.inf) == values.argmax(1)).all()


def test_a_budget_below_the_cheapest_choice_is_refused():
    with pytest.raises(ValueError, match="cheapest choice costs 6, over the budget 5"):
        solve(np.zeros((3, 2)), np.asarray([[2, 4]] * 3), 5)


def test_an_unseen_optimum_is_returned():
    values, costs, budget = knapsack(3)
    assert (
        solve_unseen(values, costs, budget, seen_in({(9,)}), np.random.default_rng(0)) == solve(values, costs, budget)
    ).all()


def test_every_feasible_choice_is_returned_once_before_any_is_repeated():
    rng = np.random.default_rng(0)
    values, costs, budget = rng.standard_normal((4, 3)), np.asarray([[2, 4, 8]] * 4), 20.0
    expected = {tuple(c) for c in every_choice(values, costs, budget)[0].tolist()}
    seen = set()
    for _ in expected:
        choice = tuple(solve_unseen(values, costs, budget, seen_in(seen), rng).tolist())
        assert choice not in seen
        seen.add(choice)
    assert seen == expected
    assert tuple(solve_unseen(values, costs, budget, seen_in(seen), rng).tolist()) in expected


def test_the_unseen_choice_is_nearly_as_good_as_the_best():
    rng = np.random.default_rng(0)
    values, costs, budget = np.cumsum(rng.random((30, 6)), axis=1), np.asarray([range(2, 14, 2)] * 30), 240.0
    best, rows = solve(values, costs, budget), np.arange(30)
    other = solve_unseen(values, costs, budget, seen_in({tuple(best.tolist())}), rng)
    assert (best != other).any()
    assert costs[rows, other].sum() <= budget
    assert values[rows, other].sum() > 0.95 * values[rows, best].sum()


def test_candidates_that_are_not_allowed_are_never_chosen():
    rng = np.random.default_rng(0)
    values, costs = rng.standard_normal((3, 4)), np.asarray([[1, 2, 3, 4]] * 3)
    values[0, 1:] = values[2, :3] = -np.inf
    seen = set()
    for _ in range(4):
        choice = solve_unseen(values, costs, 9.0, seen_in(seen), rng)
        assert (choice[0], choice[2]) == (0, 3)
        seen.add(tuple(choice.tolist()))
    assert len(seen) == 4


def test_exchanges_among_few_candidates_lose_next_to_nothing_on_wide_ranges():
    rng = np.random.default_rng(0)
    for _ in range(5):
        costs = np.tile(np.arange(64.0), (20, 1)) * rng.integers(1, 5, (20, 1))
        values = np.cumsum(rng.random((20, 64)), axis=1)
        values[:, 1:][rng.random((20, 63)) < 0.5] = -np.inf
        choice = solve(values, costs, 2000.0)
        rows, bound = np.arange(20), np.inf
        for price in np.geomspace(1e-3, 1, 200):  # the Lagrangian bound on what any choice is worth
            bound = min(bound, (values - price * costs).max(1).sum() + price * 2000.0)
        assert costs[rows, choice].sum() <= 2000.0
        assert values[rows, choice].sum() > 0.998 * bound
