"""A rank space, an objective and studies that the tests of the sampler share."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.history import History

SPACE = RankSpace(8, budget="uniform:8", costs=[100, 110, 120, 130, 120, 110, 100, 90])

RANK = SPACE.distributions()[SPACE.name(0)]

HAS_SET_CONSTRAINT = hasattr(optuna.trial.Trial, "set_constraint")  # not before Optuna 5


def score(ranks):
    """Deeper layers need rank more; something to learn."""
    return sum((1 + layer) * np.log2(1 + rank) for layer, rank in ranks.items())


def objective(trial):
    return float(score(SPACE.suggest(trial)))


def new_study(space=SPACE, *, direction="maximize", seed=0, prior=None, **settings):
    sampler = RankAdaptorSampler(space, prior=prior, seed=seed)
    return optuna.create_study(sampler=sampler, direction=direction, **settings)


def ranks_of(trial, space=SPACE):
    return {module: trial.params[space.name(module)] for module in space.modules}


def is_uniform(trial, space=SPACE):
    return ranks_of(trial, space) == space.uniform()


def constrain(trial, value):
    if HAS_SET_CONSTRAINT:
        trial.set_constraint("c", value)
    else:
        trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [value])


def broken_constraints(study):
    constraints = [getattr(t, "constraints", {}) for t in study.trials]
    return [{name: value for name, value in given.items() if value > 0} for given in constraints]


SENSITIVITY = {SPACE.name(layer): value for layer, value in enumerate([1.0, 1, 9, 1, 1, 6, 1, 1])}


def anyones(name):
    """An objective of somebody who never heard of this package, with names in a style of his own."""

    def run(trial):
        ranks = {i: trial.suggest_int(name.format(i), 2, 16, step=2) for i in range(10)}
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
        batch = trial.suggest_int("batch_size", 1, 64)
        schedule = trial.suggest_categorical("schedule", ["cosine", "linear", None])
        off = abs(np.log10(rate) + 3) + abs(batch - 32) / 32 + (schedule != "linear")
        return float(score(ranks) - 20 * off)

    return run


X = FloatDistribution(0, 1)


def history_of(study):
    history = History(study)
    history.refresh()
    return history


def encoded(study, history=None, space=None):
    history = history or history_of(study)
    return history.encoded(Encoding(space or {"x": X}), RankAdaptorSampler(prior=None)._new_model)


def add(study, params=None, value=None, *, distributions=None, reports=None, state=None, attrs=None):
    params = {"x": 0.5} if params is None else params
    if state is None:
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
    several = isinstance(value, list)
    study.add_trial(
        create_trial(
            state=state,
            params=params,
            distributions=distributions or {name: RANK if isinstance(v, int) else X for name, v in params.items()},
            intermediate_values=reports,
            system_attrs=attrs,
            **{"values" if several else "value": value},
        )
    )
