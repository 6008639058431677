"""Synthetic tasks: known functions of the ranks plus noise, whose optimum is known exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.tasks.ranks import random_ranks
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.surrogate.allocations import Allocations
from rankadaptor_optuna.surrogate.grid import RankGrid


@dataclass
class Synthetic:
    """An additive score of 24 layers.

    Attributes:
        name: Name of the task.
        smooth: Whether the layers' weights are a smooth function of the depth, or independent.
        noise: Standard deviation of the noise, in standard deviations of random allocations' scores.
        seed: Seed of the function and of the noise.
        optimum: The best configuration within the budget.
    """

    name: str
    smooth: bool
    noise: float
    seed: int

    def __post_init__(self) -> None:
        n, rng = 24, np.random.default_rng(self.seed)
        self.space = RankSpace(n, budget="uniform:8", costs=rng.uniform(0.7, 1.3, n).tolist())
        depth = np.linspace(0, 1, n)
        waves = sum(rng.standard_normal() * np.cos(np.pi * k * depth) / (1 + k) for k in range(5))
        worth = np.exp(waves if self.smooth else 0.7 * rng.standard_normal(n))
        ranks = np.asarray(self.space.candidates, dtype=np.float64)
        self._table = worth[:, None] * -(ranks ** -rng.uniform(0.3, 0.9))[None]
        allocations = Allocations.of(RankGrid.from_space(self.space), self.space.searched_budget)
        self.optimum = Ranks(zip(self.space.layers, allocations.ranks_of(allocations.best(self._table)), strict=True))
        random = [self._value(random_ranks(self.space, rng)) for _ in range(200)]
        self._scale = float(np.std(random))

    def _value(self, ranks: Mapping[Any, int]) -> float:
        return float(sum(self._table[i, self.space.candidates.index(r)] for i, r in enumerate(ranks.values())))

    def losses(
        self, configurations: Sequence[Mapping[Any, int]], seed: Sequence[int], *, report: bool = False
    ) -> list[float]:
        """Returns losses that depend on ranks and seed alone; in the report without noise."""
        found = []
        for ranks, own in zip(configurations, seed, strict=True):
            noise = 0.0 if report else self.noise * _standard_normal([self.seed, own, *ranks.values()])
            found.append(noise * self._scale - self._value(ranks))
        return found


def _standard_normal(key: Sequence[int]) -> float:
    """Returns a draw that is always the same for a key."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()[:8]
    return float(np.random.default_rng(int.from_bytes(digest)).standard_normal())


def synthetic_tasks() -> list[Synthetic]:
    """Returns the race's synthetic tasks: smooth or not, with little or much noise."""
    return [
        Synthetic(f"synthetic {'smooth' if smooth else 'rough'}, noise {noise}", smooth, noise, seed)
        for seed, (smooth, noise) in enumerate([(True, 0.2), (True, 1.0), (False, 0.2), (False, 1.0)])
    ]
