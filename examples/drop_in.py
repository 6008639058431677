"""Drop the sampler into a study that TPE has begun: it goes on from TPE's trials, with any parameters and names."""

from __future__ import annotations

import math

import optuna

from rankadaptor_optuna import RankAdaptorSampler, recommend


def objective(trial: optuna.Trial) -> float:
    """Stands in for your own training: deeper layers profit more from rank, and there is a best learning rate."""
    ranks = [trial.suggest_int(f"layer_{i}_rank", 2, 16, step=2) for i in range(12)]
    lr = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
    quality = sum((i + 1) * rank / (rank + 4) for i, rank in enumerate(ranks)) - 0.4 * sum(ranks)
    return quality - 3 * abs(math.log10(lr / 1e-3))


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=20)
print(f"TPE, 20 trials:                      {study.best_value:.2f}")

study.sampler = RankAdaptorSampler(seed=0)  # that is all
study.optimize(objective, n_trials=20)
print(f"and 20 more with RankAdaptorSampler: {study.best_value:.2f}")
print("recommended:", recommend(study).params)
