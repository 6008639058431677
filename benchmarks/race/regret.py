"""Losses of found configurations on fresh seeds and text, and their regret."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.report import FRESH
from benchmarks.tasks.losses import Losses, Task
from benchmarks.tasks.ranks import random_ranks
from benchmarks.tasks.synthetic import Synthetic
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.surrogate.grid import Array

UNIFORM = (2, 4, 6, 8, 10, 12, 16)
N_RANDOM = 20
N_FEW = 10
# seeds to choose the best configuration: three for all that was found, six more for the best few
_CHOICE = ((201, 202, 203), (301, 302, 303, 304, 305, 306))

Found = Mapping[str, Any]


def measure(name: str, task: Task, losses: Losses, chosen: Mapping[tuple[str, int, int], Ranks]) -> Found:
    """Measures the configurations that searches found, and references, on fresh seeds and text.

    Args:
        name: The task's name.
        task: The task.
        losses: The losses.
        chosen: Configurations by competitor, number of trials and seed.

    Returns:
        ``losses`` by competitor and number of trials, (seeds,) each; the losses of ``uniform`` ranks, of the ``best``
        configuration and of ``random`` ones with their standard deviation; ``curve``: loss by uniform rank.
    """
    space = task.space
    rng = np.random.default_rng(12345)
    uniform = next(iter(space.uniform().values()))
    references: dict[tuple[str, int], Ranks] = {
        **{("uniform", rank): Ranks.uniform(space.layers, rank) for rank in UNIFORM},
        **{("random", i): random_ranks(space, rng) for i in range(N_RANDOM)},
    }
    if isinstance(task, Synthetic):
        references = {k: r for k, r in references.items() if set(r.values()) <= set(space.candidates)}
        references["optimum", 0] = task.optimum
    everything: dict[Any, Ranks] = {**chosen, **references}
    asked = [(ranks, seed) for ranks in everything.values() for seed in FRESH]
    measured = np.reshape(losses(asked, report=True), (-1, len(FRESH)))
    by_key = dict(zip(everything, measured.mean(1).tolist(), strict=True))
    last = max(n for _, n, _ in chosen)
    ends = [ranks for (_, n, _), ranks in chosen.items() if n == last]
    best = _best([*ends, *(r for k, r in references.items() if k[0] == "optimum"), space.uniform()], losses)
    by_competitor: dict[str, dict[int, list[float]]] = {}
    for who, n, seed in chosen:
        by_competitor.setdefault(who, {}).setdefault(n, []).append(by_key[who, n, seed])
    random = measured[[key[0] == "random" for key in everything]]
    between = [stats.spearmanr(*pair).statistic for pair in itertools.combinations(random.T, 2)]
    return {
        "task": name,
        "uniform": by_key["uniform", uniform],
        "random": float(random.mean()),
        "random sd": float(random.mean(1).std(ddof=1)),
        "correlation between seeds": float(np.mean(between)),
        "best": float(np.mean(losses([(best, seed) for seed in FRESH], report=True))),
        "curve": {key[1]: loss for key, loss in by_key.items() if key[0] == "uniform"},
        "losses": by_competitor,
    }


def _best(found: Sequence[Ranks], losses: Losses) -> Ranks:
    """Chooses the best of some configurations on seeds that no other figure uses.

    The lowest of hundreds of noisy losses is lower than it would be again, so choice and measurement need other seeds.
    """
    left = list({tuple(ranks.values()): ranks for ranks in found}.values())
    seeds: tuple[int, ...] = ()
    for more, n in zip(_CHOICE, (N_FEW, 1), strict=True):
        seeds += more
        measured = losses([(ranks, seed) for ranks in left for seed in seeds], report=True)
        left = [left[i] for i in np.reshape(measured, (-1, len(seeds))).mean(1).argsort(kind="stable")[:n]]
    return left[0]


def regret(found: Found, losses: Sequence[float] | float) -> Array:
    """Returns normalised regrets: 0 for the best configuration found, 1 for the mean of random allocations."""
    return np.asarray((np.asarray(losses) - found["best"]) / max(found["random"] - found["best"], 1e-12))


def equivalent_rank(found: Found, loss: float) -> float:
    """Returns the uniform rank with the same loss, interpolated on a log scale."""
    curve = -np.minimum.accumulate(list(found["curve"].values()))
    return float(2 ** np.interp(-loss, curve, np.log2(list(found["curve"]))))


def discrimination(found: Found) -> dict[str, Any]:
    """Returns how well a task tells allocations apart: the curve of uniform ranks, and random allocations' spread."""
    curve = {f"uniform {rank}": f"{loss:.4f}" for rank, loss in found["curve"].items()}
    names = ("random", "random sd", "correlation between seeds")
    return {"task": found["task"], **curve, **{name: f"{found[name]:.4f}" for name in names}}
