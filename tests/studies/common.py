"""A rank space, objectives and studies that the tests of recommendations share."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.samplers import TPESampler

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, verification_seed
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading

SPACE = RankSpace(
    10, budget="uniform:8", layers=range(1, 9), costs=[100] * 4 + [120] * 4, fixed_ranks={0: 8, 9: 8}, fixed_cost=1600
)


def score(ranks):
    """Deeper layers need rank more."""
    return sum(layer * np.log2(1 + rank) for layer, rank in ranks.items())


def own_gain(study, ranks):
    """What the search predicts on its own seed: mean and standard deviation."""
    return (float(x[0]) for x in FittedStudy(StudyReading(study, SPACE)).model.predict_gain([*ranks.values()]))


def any_study(name="r_{}", n_trials=15, n_layers=6, sampler=None):
    """Somebody's own study: a sampler that knows nothing of ranks, and other parameters beside them."""

    def objective(trial):
        ranks = {i: trial.suggest_int(name.format(i), 2, 16, step=2) for i in range(n_layers)}
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        kind = trial.suggest_categorical("kind", ["a", "b"])
        return float(score(ranks) - 10 * abs(np.log10(rate) + 3) - 10 * (kind == "a"))

    study = optuna.create_study(direction="maximize", sampler=sampler or TPESampler(seed=0))
    study.optimize(objective, n_trials=n_trials)
    return study


HAS_SET_CONSTRAINT = hasattr(optuna.trial.Trial, "set_constraint")  # not before Optuna 5


def constrain(trial, value):
    if HAS_SET_CONSTRAINT:
        trial.set_constraint("c", value)
    else:
        trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [value])


OFFSET = 1000.0  # between two seeds, far more than between two configurations


def verifiable(gain=1.0, noise=0.3, search_noise=0.0, direction="maximize"):
    """An objective that heeds the seed: an offset of its own, and allocations that matter ``gain`` times as much."""
    sign = 1 if direction == "maximize" else -1

    def objective(trial):
        ranks, seed = SPACE.suggest(trial), verification_seed(trial)
        rng = np.random.default_rng([seed or 0, *ranks.values()])
        if seed is None:
            return float(sign * (score(ranks) + search_noise * rng.standard_normal()))
        return float(sign * (gain * score(ranks) + OFFSET * (seed % 10) + noise * rng.standard_normal()))

    return objective


def searched(n_trials=15, objective=None, direction="maximize", **settings):
    study = optuna.create_study(direction=direction, sampler=RankAdaptorSampler(SPACE, prior=None, seed=0), **settings)
    study.optimize(objective or verifiable(direction=direction), n_trials=n_trials)
    return study


def verifying(study, state=None):
    trials = study.trials if state is None else study.get_trials(states=(state,))
    return [t for t in trials if verification_seed(t) is not None]


def configured(trial):
    return trial.params or trial.system_attrs["fixed_params"]


def conditional(trial):
    """An objective with a parameter for each of two optimisers, and a little noise."""
    ranks = {i: trial.suggest_int(f"r_{i}", 2, 16, step=2) for i in range(5)}
    kind = trial.suggest_categorical("optimizer", ["sgd", "adam"])
    speed = trial.suggest_float("momentum" if kind == "sgd" else "beta", 0, 1)
    noise = np.random.default_rng(trial.number).standard_normal() if hasattr(trial, "number") else 0.0
    return float(score(ranks) - abs(speed - 0.5) + 5 * noise)
