"""A multiple-choice knapsack: one candidate per row, the highest total value within a budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.grid import Array

Choice = NDArray[np.intp]


_MAX_PAIRED = 400
_NEIGHBOURS, _ROUNDS = 200, 16  # tried at once, and how often where all were seen


def solve(values: Array, costs: Array, budget: float, max_sweeps: int = 50) -> Choice:
    """The choice of one candidate per layer with the highest total value whose total cost is within the budget.

    Lagrangian relaxation by bisection, then single moves and pairwise exchanges until none helps. The result is
    feasible by construction; it need not be the optimum, though on small instances it was wherever brute force checked.

    Args:
        values: (L, C); a candidate that is not allowed has -inf.
        costs: (L, C).
        budget: Most total cost; infinite for none.
        max_sweeps: Bound on the rounds of exchanges.

    Returns:
        Candidate index per layer, (L,).

    Raises:
        ValueError: Even the cheapest choice is over the budget.
    """
    rows = np.arange(len(values))
    allowed = np.isfinite(values)
    cheapest = np.where(allowed, costs, np.inf).argmin(1)
    if costs[rows, cheapest].sum() > budget:
        raise ValueError(
            f"the cheapest choice costs {costs[rows, cheapest].sum():,.0f}, over the budget {budget:,.0f}."
        )
    choice = values.argmax(1)
    if costs[rows, choice].sum() <= budget:
        return choice

    def at(price: float) -> Choice:
        return (values - price * costs).argmax(1)

    over, choice, low, high = choice, cheapest, 0.0, 1.0
    for _ in range(100):
        if costs[rows, at(high)].sum() <= budget:
            break
        low, high = high, 2 * high
    for _ in range(60):
        if (over != choice).sum() <= 1:  # what is between them is a single move
            break
        price = (low + high) / 2
        priced = at(price)
        if costs[rows, priced].sum() <= budget:
            choice, high = priced, price
        else:
            over, low = priced, price
    if values.size > _MAX_PAIRED:  # the pairs of all moves would be many: those worth most at the final price will do
        worth = np.where(allowed, values - high * costs, -np.inf)
        worth[rows, choice] = np.inf
        kept = np.argsort(-worth, axis=1, kind="stable")[:, : max(2, _MAX_PAIRED // len(values))]
        few = np.take_along_axis(values, kept, 1), np.take_along_axis(costs, kept, 1)
        return kept[rows, _exchange(*few, budget, np.zeros(len(values), dtype=np.intp), max_sweeps)]
    return _exchange(values, costs, budget, choice, max_sweeps)


def _exchange(values: Array, costs: Array, budget: float, choice: Choice, max_sweeps: int) -> Choice:
    n, width = values.shape
    rows = np.arange(n)
    choice = choice.copy()
    for _ in range(max_sweeps):
        gains = values - values[rows, choice][:, None]
        extra = costs - costs[rows, choice][:, None]
        slack = budget - costs[rows, choice].sum()
        flat_gain, flat_extra = gains.ravel(), extra.ravel()
        layer = np.repeat(rows, width)
        pair_gain = flat_gain[:, None] + flat_gain[None]  # staying put is a move too, so single moves are covered
        possible = (flat_extra[:, None] + flat_extra[None] <= slack) & (layer[:, None] != layer[None])
        if n == 1:
            pair_gain, possible = flat_gain[:, None], (flat_extra <= slack)[:, None]
        pair_gain = np.where(possible, pair_gain, -np.inf)
        best = int(pair_gain.argmax())
        if not pair_gain.ravel()[best] > 1e-12:
            break
        for move in np.unravel_index(best, pair_gain.shape)[: 1 if n == 1 else 2]:
            choice[layer[move]] = move % width
    return choice


def solve_unseen(
    values: Array, costs: Array, budget: float, is_seen: Callable[[Choice], bool], rng: np.random.Generator
) -> Choice:
    """As ``solve``, but the best choice found that ``is_seen`` denies.

    Where the optimum was seen already, its neighbours (up to four layers changed) are tried by value, and failing
    those, random feasible choices; in a space so small that all was seen, the optimum is returned again.
    """
    best = solve(values, costs, budget)
    if not is_seen(best):
        return best
    rows, allowed = np.arange(len(values)), np.isfinite(values)
    for _ in range(_ROUNDS):
        n_changed = 1 + rng.integers(4, size=_NEIGHBOURS)
        changed = rng.random((_NEIGHBOURS, len(values))).argsort(1).argsort(1) < n_changed[:, None]
        drawn = np.where(allowed, rng.random((_NEIGHBOURS, *values.shape)), -1).argmax(2)
        choices = np.where(changed, drawn, best)
        choices = choices[costs[rows, choices].sum(1) <= budget]
        for choice in choices[np.argsort(-values[rows, choices].sum(1), kind="stable")]:
            if not is_seen(choice):
                return choice
    noisy = np.where(np.isfinite(values), rng.standard_normal(values.shape), -np.inf)
    return solve(noisy, costs, budget)
