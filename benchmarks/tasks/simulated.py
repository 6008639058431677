"""Simulated studies of any depth, for measurements that need hundreds of tasks.

Each study draws a number of layers, the share that pruning took from each layer, the weight of each layer's loss
(smooth along the depth, plus noise, plus a part that follows the pruning), and how fast it saturates in rank. The
distributions are set by hand.
"""

from __future__ import annotations

import numpy as np

from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.knapsack import solve

CANDIDATES = ((2, 4, 6, 8, 10, 12), (2, 4, 8, 16), (4, 8, 16, 32), (1, 2, 4, 8), (0, 4, 8, 16, 32))


def smooth(depth: Array, rng: np.random.Generator, n: int = 4) -> Array:
    """Draws a smooth function of the depth with unit scale: ``n`` cosine waves of random phase."""
    waves = np.cos(np.pi * depth[:, None] * np.arange(n) + rng.uniform(0, np.pi, n))
    out: Array = waves @ (rng.standard_normal(n) / (1 + np.arange(n) / 2))
    return out


class Simulated:
    """A simulated study: a pruned model whose recovery score is known without noise."""

    def __init__(self, rng: np.random.Generator, n_layers: int | None = None) -> None:
        n = n_layers or int(rng.integers(6, 41))
        depth = np.linspace(0, 1, n)
        profile = np.clip(0.3 + 0.2 * smooth(depth, rng) + 0.08 * rng.standard_normal(n), 0, 0.9)
        values = np.asarray(CANDIDATES[rng.integers(len(CANDIDATES))], dtype=np.float64)
        middle = values[len(values) // 2]
        costs = 1 - profile * rng.uniform(0, 1)
        self.grid = RankGrid(depth, [values] * n, profile, costs, np.full(n, middle))
        self.budget = float(middle * costs.sum())
        follows = rng.uniform(-0.5, 1.5) * (profile - profile.mean()) / max(profile.std(), 1e-6)
        self.weight = np.exp(0.5 * smooth(depth, rng) + 0.3 * follows + rng.uniform(0, 0.5) * rng.standard_normal(n))
        self.half = np.exp(rng.uniform(np.log(1), np.log(16)) + 0.4 * smooth(depth, rng))
        self.noise = rng.uniform(0.02, 0.5)

    def score(self, ranks: Array) -> Array:
        """Returns the sum over layers of weight x rank / (rank + half), (n,)."""
        scores: Array = (self.weight * ranks / (ranks + self.half)).sum(1)
        return scores

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draws configurations as a search proposes them: uniform, smooth along the depth, or free; (n, L)."""
        values = self.grid.values[0]
        rows = [self.grid.reference]
        while len(rows) < n:
            tilt = smooth(self.grid.depth, rng) if rng.random() < 0.7 else rng.standard_normal(self.grid.n_layers)
            table = tilt[:, None] * np.log1p(values) + 0.3 * rng.standard_normal((self.grid.n_layers, len(values)))
            rows.append(values[solve(table, values * self.grid.costs[:, None], self.budget)])
        return np.stack(rows)

    def task(self, n: int, rng: np.random.Generator) -> MetaTask:
        """Makes a task of n noisy trials."""
        ranks = self.sample(n, rng)
        scores = self.score(ranks)
        return MetaTask(self.grid, ranks, scores + self.noise * scores.std() * rng.standard_normal(n))
