"""How the paper's MLP profits from meta-learning, trained jointly or by Reptile, beside our own performance model.

Simulated tasks (simulated_studies.py), all of one depth, as the paper's MLP takes the rank vector itself. Every
model is meta-learned on the same tasks and predicts configurations of unseen tasks from their first trials.

    python -m benchmarks.meta_learners [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.report import check, interval, show, write
from benchmarks.tasks.simulated import World
from rankadaptor_optuna import PerformanceModel
from rankadaptor_optuna.priors.meta import meta_train
from rankadaptor_optuna.priors.pretraining import pretrain, reptile
from rankadaptor_optuna.surrogate.statistics import rank_correlation

N_LAYERS = 16
TRIALS = (0, 5, 10, 20, 50)


def main() -> None:
    """Meta-learns each, measures on unseen tasks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few tasks: only to see that it runs")
    args = parser.parse_args()
    n_tasks, n_worlds = (10, 5) if args.quick else (100, 100)
    rng = np.random.default_rng(0)
    tasks = [World(rng, N_LAYERS).task(48, rng) for _ in range(n_tasks)]
    priors: dict[str, Any] = {
        "MLP, untrained": ("paper", None),
        "MLP, joint": ("paper", pretrain(tasks)),
        "MLP, Reptile": ("paper", reptile(tasks)),
        "ours, no prior": ("bayesian", None),
        "ours, meta-trained": ("bayesian", meta_train(tasks)),
    }
    found: dict[tuple[str, int], list[float]] = {(name, n): [] for name in priors for n in TRIALS}
    for seed in range(n_worlds):
        rng = np.random.default_rng([7, seed])  # the training worlds come from another stream
        world = World(rng, N_LAYERS)
        task, test = world.task(max(TRIALS), rng), world.sample(200, rng)
        truth = world.score(test)
        for name, (mode, prior) in priors.items():
            model = PerformanceModel(world.grid, mode=mode, prior=prior)
            for start, end in zip((0, *TRIALS), TRIALS, strict=False):
                model.update(task.ranks[start:end], task.scores[start:end])
                found[name, end].append(rank_correlation(model.predict(test)[0], truth))
    rows = []
    for name in priors:
        cells = {n: interval(found[name, n]) for n in TRIALS}
        rows.append({"model": name, **{f"{n} trials": f"{mean:.3f} ±{half:.3f}" for n, (mean, half) in cells.items()}})
    show(rows)
    gain = np.subtract(found["MLP, Reptile", 10], found["MLP, untrained", 10]).mean()
    ours = np.subtract(found["ours, meta-trained", 10], found["MLP, Reptile", 10]).mean()
    checks = {
        "Reptile's gain over the untrained MLP, 10 trials": check(gain, ">= 0"),
        "our meta-trained model's over Reptile, 10 trials": check(ours, ">= 0"),
    }
    seeds = {"training": 0, "measuring": f"7/0..{n_worlds - 1}"}
    write("meta_learners_part" if args.quick else "meta_learners", rows, checks, seeds=seeds)


if __name__ == "__main__":
    main()
