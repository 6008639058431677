"""A recovery in miniature, and how the tests of the objective run it."""

from __future__ import annotations

import optuna

from rankadaptor_optuna import RankAdaptorSampler, create_study
from rankadaptor_optuna.recovery.train import TrainingConfig

TRAINING = TrainingConfig(steps=3, batch_size=2, learning_rate=0.05)


def run(job, n_trials, **settings):
    study = create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, prior=None, seed=0))
    study.optimize(job, n_trials=n_trials, **settings)
    return study


def fixed(job, *ranks):
    return optuna.trial.FixedTrial(dict(zip(job.space.distributions(), ranks, strict=True)))
