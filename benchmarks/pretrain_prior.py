"""Make the shipped prior from simulated recoveries, and measure whether it helps on simulated tasks it has not seen.

The simulator draws, for each task, a number of layers, what pruning took from each, how much each layer's loss matters
(smooth along the depth, plus free noise, plus a share that follows the damage) and how fast it saturates in rank.
It stands in until enough real studies have been collected; the model card says so.

    python benchmarks/pretrain_prior.py [--quick] [--write]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import numpy as np
from results import check, show, write

import rankadaptor_optuna
from rankadaptor_optuna.surrogate.features import Array, RankGrid
from rankadaptor_optuna.surrogate.meta import MetaTask, meta_train, rank_correlation
from rankadaptor_optuna.surrogate.model import PerformanceModel
from rankadaptor_optuna.surrogate.prior import PRETRAINED, Prior
from rankadaptor_optuna.surrogate.search import solve

CANDIDATES = ((2, 4, 6, 8, 10, 12), (2, 4, 8, 16), (4, 8, 16, 32), (1, 2, 4, 8), (0, 4, 8, 16, 32))


def smooth(depth: Array, rng: np.random.Generator, n: int = 4) -> Array:
    """A random smooth function of depth with unit scale."""
    waves = np.cos(np.pi * depth[:, None] * np.arange(n) + rng.uniform(0, np.pi, n))
    out: Array = waves @ (rng.standard_normal(n) / (1 + np.arange(n) / 2))
    return out


class World:
    """One simulated study: a pruned model whose recovery score is known without noise."""

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
        """Sum over layers of weight x rank / (rank + half), (n,)."""
        scores: Array = (self.weight * ranks / (ranks + self.half)).sum(1)
        return scores

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Configurations as a search would try them: uniform, smooth along depth, or free; (n, L)."""
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


def measure(prior: Prior | None, n_trials: int, n_worlds: int) -> dict[str, float]:
    """Mean and 95% interval over unseen worlds: rank correlation, and regret of the recommended configuration.

    Regret is 0 at the best configuration and 1 at the mean of configurations as a search would try them.
    """
    correlations, regrets, uniforms = [], [], []
    for seed in range(n_worlds):
        rng = np.random.default_rng([7, seed])  # the training worlds come from another stream
        world = World(rng)
        task, test = world.task(n_trials, rng), world.sample(200, rng)
        model = PerformanceModel(world.grid, prior=prior)
        model.update(task.ranks, task.scores)
        correlations.append(rank_correlation(model.predict(test)[0], world.score(test)))
        values = world.grid.values[0]
        costs, rows = values * world.grid.costs[:, None], np.arange(world.grid.n_layers)
        true = world.weight[:, None] * values / (values + world.half[:, None])
        best = true[rows, solve(true, costs, world.budget)].sum()
        uniform = world.score(world.grid.reference[None])[0]
        chosen = true[rows, solve(model.mean().table, costs, world.budget)].sum()
        typical = best - world.score(test).mean()
        regrets.append((best - chosen) / typical)
        uniforms.append((best - uniform) / typical)
    out = {}
    for name, found in (("rank correlation", correlations), ("regret", regrets), ("uniform", uniforms)):
        out[name] = float(np.mean(found))
        out[f"{name} ±"] = float(1.96 * np.std(found) / np.sqrt(len(found)))
    return out


def main() -> None:
    """Trains, measures, prints, and with --write replaces the shipped prior."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few tasks: only to see that it runs")
    parser.add_argument("--write", action="store_true", help="replace the shipped prior")
    args = parser.parse_args()
    n_tasks, n_worlds = (40, 20) if args.quick else (600, 200)
    rng = np.random.default_rng(0)
    tasks = [World(rng).task(48, rng) for _ in range(n_tasks)]
    prior = meta_train(
        tasks, progress=lambda epoch, loss: print(f"epoch {epoch}: held out {loss:.4f}", file=sys.stderr)
    )
    rows: list[dict[str, Any]] = []
    for n_trials in (5, 10, 20, 50):
        for name, used in (("prior", prior), ("no prior", None)):
            rows.append({"trials": n_trials, "model": name, **measure(used, n_trials, n_worlds)})
    show(
        [
            {
                "trials": row["trials"],
                "model": row["model"],
                **{key: f"{row[key]:.3f} ±{row[f'{key} ±']:.3f}" for key in ("rank correlation", "regret", "uniform")},
            }
            for row in rows
        ]
    )
    checks = {
        f"regret with prior / without, {one['trials']} trials": check(one["regret"] / other["regret"], "<= 1")
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    }
    seeds = {"training": 0, "measuring": f"7/0..{n_worlds - 1}"}
    write("pretrain_prior_part" if args.quick else "pretrain_prior", rows, checks, seeds=seeds)
    if args.write:
        PRETRAINED.parent.mkdir(exist_ok=True)
        card = {
            "learned_from": f"{n_tasks} simulated recoveries (benchmarks/pretrain_prior.py), no real study",
            "version": rankadaptor_optuna.__version__,
        }
        replace(prior, card=card).save(PRETRAINED)
        print(f"wrote {PRETRAINED}")


if __name__ == "__main__":
    main()
