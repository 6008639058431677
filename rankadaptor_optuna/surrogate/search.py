"""Candidate search inside the budget, for values that add up over layers: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.features import Array, RankGrid

if TYPE_CHECKING:
    from rankadaptor_optuna.surrogate.model import Belief

Choice = NDArray[np.intp]
_MAX_PAIRED = 400
_PENALTY_STEPS = 10
_NEIGHBOURS, _ROUNDS = 200, 16  # tried at once, and how often where all were seen


@dataclass(frozen=True)
class Allocations:
    """The rank configurations of a grid that a budget allows.

    Attributes:
        ranks: Candidate ranks, (L, C).
        costs: What each costs, (L, C).
        allowed: Which of them may be chosen, (L, C).
        budget: Most total cost; never below the cheapest configuration's.
    """

    ranks: Array
    costs: Array
    allowed: NDArray[np.bool_]
    budget: float

    @classmethod
    def of(cls, grid: RankGrid, budget: float | None = None, given: Mapping[int, float] | None = None) -> Allocations:
        """Those of ``grid``, where layers may have a ``given`` rank, candidate or not: the others get the rest."""
        ranks = grid.padded_values()
        allowed = np.arange(ranks.shape[1]) < np.asarray([len(v) for v in grid.values])[:, None]
        for row, rank in (given or {}).items():
            ranks[row], allowed[row, 1:] = rank, False
        costs = ranks * grid.costs[:, None]
        cheapest = np.where(allowed, costs, np.inf).min(1).sum()
        return cls(ranks, costs, allowed, np.inf if budget is None else max(budget, cheapest))

    def best(self, table: Array) -> Choice:
        """The choice of one candidate a layer with the highest total in ``table`` (L, C), as indices (L,)."""
        return solve(np.where(self.allowed, table, -np.inf), self.costs, self.budget)

    def best_unseen(self, table: Array, seen: Callable[[tuple[int, ...]], bool], rng: np.random.Generator) -> Choice:
        """The best choice found whose ranks were not ``seen``."""
        masked = np.where(self.allowed, table, -np.inf)
        return solve_unseen(masked, self.costs, self.budget, lambda choice: seen(self.ranks_of(choice)), rng)

    def best_few(self, table: Array, n: int, accept: Callable[[Choice], bool] = lambda choice: True) -> list[Choice]:
        """Up to ``n`` different accepted choices with the highest totals in ``table``, the best first.

        The choices other than a best one are split by the first layer in which they differ from it (Lawler, 1972).
        """
        rows, found = np.arange(len(table)), []
        masked = np.where(self.allowed, table, -np.inf)
        parts = [(self.best(table), masked)]
        for _ in range(4 * n):
            if not parts:
                break
            choice, values = parts.pop(int(np.argmax([masked[rows, best].sum() for best, _ in parts])))
            if accept(choice):
                found.append(choice)
            if len(found) == n:
                break
            for row in rows:
                part = values.copy()
                part[row, choice[row]] = -np.inf
                part[:row] = np.where(np.arange(part.shape[1]) == choice[:row, None], part[:row], -np.inf)
                cheapest = np.where(np.isfinite(part), self.costs, np.inf).min(1).sum()
                if np.isfinite(cheapest) and cheapest <= self.budget:
                    parts.append((solve(part, self.costs, self.budget), part))
        return found

    def ranks_of(self, choice: Choice) -> tuple[int, ...]:
        """The ranks of a choice."""
        return tuple(int(rank) for rank in self.ranks[np.arange(len(choice)), choice])


def keeps(constraints: Sequence[Belief], choice: Choice, point: Array, margin: float = 0.0) -> bool:
    """Whether a choice with a point (E,) of the other parameters keeps all constraints, each by a margin."""
    layers = np.arange(len(choice))
    values = [c.offset + c.table[layers, choice].sum() + c.of_ordinary(point[None])[0] for c in constraints]
    return all(value <= -margin for value in values)


def within_constraints(
    belief: Belief,
    constraints: Sequence[Belief],
    allocations: Allocations,
    best_point: Callable[[Belief], Array],
    margin: float = 0.0,
) -> tuple[Belief, Choice, Array]:
    """Takes the least penalty off a belief with which its optimum keeps all constraints, sought by bisection.

    Args:
        belief: What to maximise.
        constraints: Functions of the same features, kept where at most 0.
        allocations: The rank configurations to choose from.
        best_point: The best point of the other parameters, (E,), by a belief.
        margin: How far below 0 each constraint must be, in its own units.

    Returns:
        The penalised belief (with a large penalty where none sufficed), its best choice, and its best point.
    """
    penalty, low, high = 0.0, 0.0, math.inf
    for _ in range(_PENALTY_STEPS):
        tried = belief
        for constraint in constraints:
            tried = tried.plus(constraint, -penalty)
        choice, point = allocations.best(tried.table), best_point(tried)
        kept = keeps(constraints, choice, point, margin)
        low, high = (low, penalty) if kept else (penalty, high)
        if kept or high == math.inf:
            found = tried, choice, point
        if high == 0:
            break
        penalty = max(1, 2 * low) if high == math.inf else (low + high) / 2
    return found


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
