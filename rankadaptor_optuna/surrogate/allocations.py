"""Allocations: the rank configurations within a budget, and the best of them under constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.knapsack import Choice, solve, solve_unseen

_PENALTY_STEPS = 10  # of bisection; set by hand


@dataclass(frozen=True)
class Allocations:
    """The rank configurations of a grid that a budget allows.

    Attributes:
        ranks: Candidate ranks, (L, C).
        costs: Cost of each candidate, (L, C).
        allowed: Whether each candidate may be chosen, (L, C).
        budget: Highest total cost; never below that of the cheapest configuration.
    """

    ranks: Array
    costs: Array
    allowed: NDArray[np.bool_]
    budget: float

    @classmethod
    def of(cls, grid: RankGrid, budget: float = math.inf, given: Mapping[int, float] | None = None) -> Allocations:
        """Returns the allocations of ``grid`` within a budget.

        Args:
            grid: The searched layers.
            budget: Highest total cost. Default: none.
            given: Ranks of layers that are not chosen, candidates or not, by row; the others share the rest.
        """
        ranks = grid.padded_values()
        allowed = np.arange(ranks.shape[1]) < np.asarray([len(v) for v in grid.values])[:, None]
        for row, rank in (given or {}).items():
            ranks[row], allowed[row, 1:] = rank, False
        costs = ranks * grid.costs[:, None]
        cheapest = np.where(allowed, costs, np.inf).min(1).sum()
        return cls(ranks, costs, allowed, max(budget, cheapest))

    def best(self, table: Array) -> Choice:
        """Returns the choice with the highest total in ``table`` (L, C): a candidate's index per layer, (L,)."""
        return solve(np.where(self.allowed, table, -np.inf), self.costs, self.budget)

    def best_unseen(self, table: Array, seen: Callable[[tuple[int, ...]], bool], rng: np.random.Generator) -> Choice:
        """Returns the best choice found whose ranks were not ``seen``; see ``knapsack.solve_unseen``."""
        masked = np.where(self.allowed, table, -np.inf)
        return solve_unseen(masked, self.costs, self.budget, lambda choice: seen(self.ranks_of(choice)), rng)

    def best_few(self, table: Array, n: int, accept: Callable[[Choice], bool] = lambda choice: True) -> list[Choice]:
        """Returns up to ``n`` different accepted choices with the highest totals in ``table``, the best first.

        The choices other than the best one are split by the first layer in which they differ from it (Lawler, 1972).
        Gives up after 4 n choices, accepted or not.
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
        """Returns the ranks of a choice."""
        return tuple(int(rank) for rank in self.ranks[np.arange(len(choice)), choice])


def keeps(constraints: Sequence[Belief], choice: Choice, point: Array, margin: float = 0.0) -> bool:
    """Returns whether a choice with a point (E,) of the ordinary parameters keeps all constraints, each by a margin."""
    layers = np.arange(len(choice))
    values = [c.offset + c.table[layers, choice].sum() + c.of_ordinary(point[None])[0] for c in constraints]
    return all(value <= -margin for value in values)


class Points(NamedTuple):
    """Points of the ordinary parameters to choose from.

    Attributes:
        points: The points in the unit cube, (n, E), n at least 1.
        features: Their ``ordinary_features``, (n, G).
    """

    points: Array
    features: Array


def within_constraints(
    belief: Belief,
    constraints: Sequence[Belief],
    allocations: Allocations,
    candidates: Callable[[Belief], Points],
    margin: float = 0.0,
) -> tuple[Belief, Choice, Array]:
    """Maximises a belief under constraints.

    Ranks are those that maximise the belief less a multiple of the constraints' sum, one Lagrange multiplier for all,
    which is bisected to the least whose optimum keeps them. As a penalty that is nearly linear in a point drives it
    from one end of its range to the other, the point is the best of those that keep the constraints with these ranks.
    Of all multiples tried, the pair of ranks and point with the highest belief is returned.

    Args:
        belief: Function to maximise.
        constraints: Functions of the same features, kept where at most 0.
        allocations: The rank configurations to choose from.
        candidates: Returns points to choose from, some of them near the best one by a belief.
        margin: Distance by which each constraint must lie below 0, in its own units.

    Returns:
        The penalised belief that led to the ranks, their choice, and the point, (E,). Where nothing keeps the
        constraints, those of the largest multiple.
    """
    layers = np.arange(len(allocations.ranks))
    penalty, low, high, best = 0.0, 0.0, math.inf, -math.inf
    for _ in range(_PENALTY_STEPS):
        tried = belief
        for constraint in constraints:
            tried = tried.plus(constraint, -penalty)
        choice = allocations.best(tried.table)
        points, features = candidates(tried)
        feasible = np.ones(len(points), dtype=bool)
        for c in constraints:
            feasible &= c.offset + c.table[layers, choice].sum() + c.of_features(features) <= -margin
        first = int(tried.of_features(features).argmax())
        values = np.where(feasible, belief.of_features(features), -np.inf) + belief.table[layers, choice].sum()
        if values.max() > best:
            best, found = float(values.max()), (tried, choice, points[int(values.argmax())])
        elif best == -math.inf:
            found = tried, choice, points[first]
        low, high = (low, penalty) if feasible[first] else (penalty, high)
        if high == 0:
            break
        penalty = max(1, 2 * low) if high == math.inf else (low + high) / 2
    return found
