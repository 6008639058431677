"""Compare ways to meta-learn: the paper's MLP trained jointly or by Reptile, and the package's performance model.

    python -m benchmarks.meta_learners [--quick]

Simulated studies of one depth, as the paper's MLP takes the rank vector itself. Every model is meta-learned on the same
studies and predicts configurations of unseen studies from their first trials.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.report import cell, check, command_parser, show, write
from benchmarks.tasks.simulated import Simulated
from rankadaptor_optuna import PerformanceModel
from rankadaptor_optuna.priors.meta import meta_train
from rankadaptor_optuna.priors.pretraining import pretrain, reptile
from rankadaptor_optuna.surrogate.statistics import rank_correlation

N_LAYERS = 16
TRIALS = (0, 5, 10, 20, 50)


def main() -> None:
    """Meta-learns each model, measures on unseen studies and writes results/meta_learners.json."""
    args = command_parser(__doc__, "few studies").parse_args()
    n_tasks, n_unseen = (10, 5) if args.quick else (100, 100)
    rng = np.random.default_rng(0)
    tasks = [Simulated(rng, N_LAYERS).task(48, rng) for _ in range(n_tasks)]
    priors: dict[str, Any] = {
        "MLP, untrained": ("paper", None),
        "MLP, joint": ("paper", pretrain(tasks)),
        "MLP, Reptile": ("paper", reptile(tasks)),
        "ours, no prior": ("bayesian", None),
        "ours, meta-trained": ("bayesian", meta_train(tasks)),
    }
    found: dict[tuple[str, int], list[float]] = {(name, n): [] for name in priors for n in TRIALS}
    for seed in range(n_unseen):
        rng = np.random.default_rng([7, seed])  # the training studies come from another stream
        study = Simulated(rng, N_LAYERS)
        task, test = study.task(max(TRIALS), rng), study.sample(200, rng)
        truth = study.score(test)
        for name, (mode, prior) in priors.items():
            model = PerformanceModel(study.grid, mode=mode, prior=prior)
            for start, end in zip((0, *TRIALS), TRIALS, strict=False):
                model.update(task.ranks[start:end], task.scores[start:end])
                found[name, end].append(rank_correlation(model.predict(test)[0], truth))
    rows = [{"model": name, **{f"{n} trials": cell(found[name, n]) for n in TRIALS}} for name in priors]
    show(rows)
    gain = np.subtract(found["MLP, Reptile", 10], found["MLP, untrained", 10]).mean()
    ours = np.subtract(found["ours, meta-trained", 10], found["MLP, Reptile", 10]).mean()
    checks = {
        "Reptile's gain over the untrained MLP, 10 trials": check(gain, ">= 0"),
        "our meta-trained model's over Reptile, 10 trials": check(ours, ">= 0"),
    }
    seeds = {"training": 0, "measuring": f"7/0..{n_unseen - 1}"}
    write("meta_learners", rows, checks, seeds=seeds, part=args.quick)
