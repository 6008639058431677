"""Rank configurations to measure: random ones and ones in proportion to weights."""

from __future__ import annotations

import numpy as np

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.knapsack import solve


def random_ranks(space: RankSpace, rng: np.random.Generator) -> Ranks:
    """Draws independent ranks, then moves single layers by one candidate until the budget is met and used."""
    candidates, ranks = list(space.candidates), {i: int(rng.choice(space.candidates)) for i in space.layers}
    costs = dict(zip(space.layers, space.costs, strict=True))
    total = sum(costs[layer] * rank for layer, rank in ranks.items())
    for step in (-1, 1):
        for layer in [i for _ in candidates for i in rng.permutation(space.layers).tolist()]:
            place = candidates.index(ranks[layer]) + step
            if 0 <= place < len(candidates):
                moved = total + costs[layer] * (candidates[place] - ranks[layer])
                if total > space.searched_budget if step < 0 else moved <= space.searched_budget:
                    ranks[layer], total = candidates[place], moved
    return Ranks(ranks)


def weighted_ranks(space: RankSpace, weights: Array) -> Ranks:
    """Returns the ranks with the highest sum of weight x log(1 + rank) within the budget, (L,) weights."""
    values, costs = np.asarray(space.candidates, float), np.asarray(space.costs)
    choice = solve(weights[:, None] * np.log1p(values), costs[:, None] * values, space.searched_budget)
    return Ranks({layer: space.candidates[i] for layer, i in zip(space.layers, choice, strict=True)})
