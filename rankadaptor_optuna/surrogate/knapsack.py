"""The multiple-choice knapsack problem: one candidate per row, with the highest total value within a budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.grid import Array

Choice = NDArray[np.intp]

# set by hand
_MAX_SWEEPS = 50  # rounds of exchanges
_MAX_EXCHANGED = 400  # candidates among which all pairs of moves are tried; their number is its square
_NEIGHBOURS, _ROUNDS = 200, 16  # neighbours drawn at once, and rounds of drawing where all were seen
_MAX_CHANGED = 4  # layers in which a neighbour differs


def solve(values: Array, costs: Array, budget: float) -> Choice:
    """Returns the choice of one candidate per row with the highest total value within the budget.

    Lagrangian relaxation by bisection (Fisher, 1981), then single moves and exchanges of two rows until none helps. The
    result is feasible by construction; it need not be the optimum, though on small instances it was wherever brute
    force checked.

    Args:
        values: (L, C); -inf for a candidate that is not allowed.
        costs: (L, C).
        budget: Highest total cost; infinite for none.

    Returns:
        Candidate index per row, (L,).

    Raises:
        ValueError: Even the cheapest choice is over the budget.
    """
    rows, allowed = np.arange(len(values)), np.isfinite(values)
    cheapest = np.where(allowed, costs, np.inf).argmin(1)
    if costs[rows, cheapest].sum() > budget:
        raise ValueError(
            f"the cheapest choice costs {costs[rows, cheapest].sum():,.0f}, over the budget {budget:,.0f}."
        )
    best = values.argmax(1)
    if costs[rows, best].sum() <= budget:
        return best
    choice, price = _relaxed(values, costs, budget, best, cheapest)
    if values.size <= _MAX_EXCHANGED:
        return _exchanged(values, costs, budget, choice)
    # of each row, the choice and the candidates worth most at the final price
    worth = np.where(allowed, values - price * costs, -np.inf)
    worth[rows, choice] = np.inf
    kept = np.argsort(-worth, axis=1, kind="stable")[:, : max(2, _MAX_EXCHANGED // len(values))]
    few = np.take_along_axis(values, kept, 1), np.take_along_axis(costs, kept, 1)
    return kept[rows, _exchanged(*few, budget, np.zeros(len(values), dtype=np.intp))]


def _relaxed(values: Array, costs: Array, budget: float, best: Choice, cheapest: Choice) -> tuple[Choice, float]:
    """Returns the best choice at the lowest price of cost that keeps it within the budget, and that price."""
    rows = np.arange(len(values))

    def at(price: float) -> Choice:
        return (values - price * costs).argmax(1)

    over, choice, low, high = best, cheapest, 0.0, 1.0
    for _ in range(100):
        if costs[rows, at(high)].sum() <= budget:
            break
        low, high = high, 2 * high
    for _ in range(60):
        if (over != choice).sum() <= 1:  # they differ by a single move, which the exchanges try
            break
        price = (low + high) / 2
        priced = at(price)
        if costs[rows, priced].sum() <= budget:
            choice, high = priced, price
        else:
            over, low = priced, price
    return choice, high


def _exchanged(values: Array, costs: Array, budget: float, choice: Choice) -> Choice:
    """Returns a choice improved by the best exchange of two rows' candidates, again and again until none helps."""
    n, width = values.shape
    rows = np.arange(n)
    choice = choice.copy()
    for _ in range(_MAX_SWEEPS):
        gains = values - values[rows, choice][:, None]
        extra = costs - costs[rows, choice][:, None]
        slack = budget - costs[rows, choice].sum()
        flat_gain, flat_extra = gains.ravel(), extra.ravel()
        row = np.repeat(rows, width)
        pair_gain = flat_gain[:, None] + flat_gain[None]  # keeping a row's candidate is a move, too: single moves
        possible = (flat_extra[:, None] + flat_extra[None] <= slack) & (row[:, None] != row[None])
        if n == 1:
            pair_gain, possible = flat_gain[:, None], (flat_extra <= slack)[:, None]
        pair_gain = np.where(possible, pair_gain, -np.inf)
        best = int(pair_gain.argmax())
        if not pair_gain.ravel()[best] > 1e-12:
            break
        for move in np.unravel_index(best, pair_gain.shape)[: 1 if n == 1 else 2]:
            choice[row[move]] = move % width
    return choice


def solve_unseen(
    values: Array, costs: Array, budget: float, is_seen: Callable[[Choice], bool], rng: np.random.Generator
) -> Choice:
    """Returns the best choice found for which ``is_seen`` is false.

    Where the choice of ``solve`` was seen, its neighbours (up to four rows changed) are tried by value. Where all of
    them were seen, a random feasible choice is returned, seen or not.
    """
    best = solve(values, costs, budget)
    if not is_seen(best):
        return best
    rows, allowed = np.arange(len(values)), np.isfinite(values)
    for _ in range(_ROUNDS):
        n_changed = 1 + rng.integers(_MAX_CHANGED, size=_NEIGHBOURS)
        changed = rng.random((_NEIGHBOURS, len(values))).argsort(1).argsort(1) < n_changed[:, None]
        drawn = np.where(allowed, rng.random((_NEIGHBOURS, *values.shape)), -1).argmax(2)
        choices = np.where(changed, drawn, best)
        choices = choices[costs[rows, choices].sum(1) <= budget]
        for choice in choices[np.argsort(-values[rows, choices].sum(1), kind="stable")]:
            if not is_seen(choice):
                return choice
    noisy = np.where(allowed, rng.standard_normal(values.shape), -np.inf)
    return solve(noisy, costs, budget)
