"""Candidate search inside the budget, for values that add up over layers: a multiple-choice knapsack."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.features import Array

Choice = NDArray[np.intp]


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

    choice, low, high = cheapest, 0.0, 1.0
    for _ in range(100):
        if costs[rows, at(high)].sum() <= budget:
            break
        low, high = high, 2 * high
    for _ in range(60):
        price = (low + high) / 2
        priced = at(price)
        if costs[rows, priced].sum() <= budget:
            choice, high = priced, price
        else:
            low = price
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
    values: Array, costs: Array, budget: float, seen: set[tuple[int, ...]], rng: np.random.Generator
) -> Choice:
    """As ``solve``, but the best choice found that is not in ``seen``.

    Where the optimum was seen already, its neighbours (one layer changed, or two) are tried by value, and failing
    those, random feasible choices; in a space so small that all was seen, the optimum is returned again.
    """
    best = solve(values, costs, budget)
    if tuple(best.tolist()) not in seen:
        return best
    rows = np.arange(len(values))
    allowed = [np.flatnonzero(np.isfinite(row)) for row in values]
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(4):
        for _ in range(200):
            choice = best.copy()
            for i in rng.choice(len(values), size=min(len(values), 1 + int(rng.integers(4))), replace=False):
                choice[i] = rng.choice(allowed[i])
            key = tuple(choice.tolist())
            if key not in seen and costs[rows, choice].sum() <= budget:
                candidates.append((float(values[rows, choice].sum()), key))
        if candidates:
            return np.asarray(max(candidates)[1], dtype=np.intp)
    noisy = np.where(np.isfinite(values), rng.standard_normal(values.shape), -np.inf)
    return solve(noisy, costs, budget)
