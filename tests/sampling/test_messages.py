"""What the sampler refuses and what it says: names, spaces, constraints of other owners."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.database.attributes import SPACE_ATTR
from tests.sampling.common import HAS_SET_CONSTRAINT, SPACE, new_study, objective, ranks_of, score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "uniform:8"}, "space must be a RankSpace, got 'uniform:8'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": "0"}, "seed must be at least 0, got '0'; give an integer"),
        ({"seed": 1.5}, "seed must be at least 0, got 1.5; give an integer"),
        ({"n_startup_trials": -1}, "n_startup_trials must be at least 0, got -1"),
        ({"space": SPACE, "ranks": "r_{}"}, "not both"),
        ({"ranks": "rank"}, "for the layer number"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        RankAdaptorSampler(**arguments)


def logged(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def log(caplog):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    yield caplog
    optuna.logging.disable_propagation()
    optuna.logging.set_verbosity(verbosity)
    optuna.logging.set_verbosity(before)


def test_names_in_another_style_than_the_spaces_are_refused_at_the_first_trial():
    study = new_study()
    with pytest.raises(ValueError, match=r"asks for 'layer_0_rank', the rank space has 'layer_00_rank'.*layer_{}_rank"):
        study.optimize(lambda trial: trial.suggest_int("layer_0_rank", 2, 12, step=2), n_trials=1)
    assert study.trials[0].state is TrialState.FAIL
    space = RankSpace(8, budget="uniform:4", name="layer_{}_rank")
    study = new_study(space)
    study.optimize(lambda t: sum(t.suggest_int(f"layer_{i}_rank", 2, 12, step=2) for i in range(8)), n_trials=8)
    assert max(t.value for t in study.trials) <= 32


def test_a_sampler_says_once_which_parameters_it_takes_for_ranks(log):
    study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0))
    study.optimize(lambda trial: float(sum(trial.suggest_int(f"r_{i}", 2, 8) for i in range(4))), n_trials=4)
    said = [line for line in logged(log) if "taken for ranks" in line]
    assert len(said) == 1
    assert "4 parameters are taken for ranks along the depth, 'r_0' to 'r_3'" in said[0]


def test_a_parameter_that_is_not_searched_with_the_ranks_is_named_once(log):
    def objective(trial):
        if trial.number > 3:
            trial.suggest_float("late", 0, 1)
        return objective_without(trial)

    def objective_without(trial):
        return float(sum(trial.suggest_int(f"r_{i}", 2, 8) for i in range(4)))

    study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0))
    study.optimize(objective, n_trials=8)
    assert sum("Left to TPESampler: 'late', as not all" in line for line in logged(log)) == 1
    log.clear()
    study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0, warn_independent_sampling=False))
    study.optimize(objective, n_trials=8)
    assert not any("Left to" in line for line in logged(log))


def test_without_names_of_ranks_it_samples_as_tpe_does_and_says_so(log):
    """Optuna's tutorial: numbers of units by layer are no ranks."""

    def objective(trial):
        return sum((trial.suggest_int(f"n_units_l{i}", 0, 100) / 100 - 0.3) ** 2 for i in range(5))

    def best(sampler):
        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=40)
        return study.best_value

    ours, tpe, random = (
        np.mean([best(make(seed=seed)) for seed in range(4)])
        for make in (RankAdaptorSampler, TPESampler, RandomSampler)
    )
    assert ours < min(1.5 * tpe, 0.75 * random)
    assert any("'n_units_l4', as no trial has parameters named like ranks" in line for line in logged(log))


def test_workers_with_different_spaces_store_theirs_once_and_say_so(log):
    other = RankSpace(8, budget="uniform:4", costs=list(SPACE.costs))
    study = new_study()
    study.optimize(objective, n_trials=1)
    second = optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=RankAdaptorSampler(other))
    for each in (second, study, second):
        space = SPACE if each is study else other
        each.optimize(lambda trial, space=space: float(score(space.suggest(trial))), n_trials=1)
        assert study.user_attrs[SPACE_ATTR]["budget"] == other.budget
    assert sum("was searched with another rank space" in line for line in logged(log)) == 2


@pytest.mark.skipif(not HAS_SET_CONSTRAINT, reason="Optuna 4 has no names of constraints")
def test_a_user_may_name_a_constraint_budget():
    def over(trial):
        ranks = SPACE.suggest(trial)
        trial.set_constraint("budget", float(ranks[7] - 6))
        return float(score(ranks))

    study = new_study()
    study.optimize(over, n_trials=24)
    assert np.mean([ranks_of(t)[7] > 6 for t in study.trials[10:]]) < 0.4


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optunas_gp_sampler_works_with_a_space():
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0, n_startup_trials=2), direction="maximize")
    study.optimize(objective, n_trials=5)
    assert len(study.trials) == 5


@pytest.mark.parametrize(
    ("ranks", "suggest", "n_layers", "message"),
    [
        ("layer_{}_r", "suggest_int", 5, "no name matches the declared ranks, 'layer_{}_r'"),
        ("layer_{}_rank", "suggest_float", 5, "ranks take integers from 0 on, 'layer_0_rank' has FloatDistribution"),
        (None, "suggest_float", 5, "ranks take integers from 0 on, 'layer_0_rank' has FloatDistribution"),
        (None, "suggest_int", 2, "fewer than 3 names differ from 'layer_0_rank'"),
    ],
)
def test_it_is_said_why_parameters_are_no_ranks(log, ranks, suggest, n_layers, message):
    def objective(trial):
        return float(sum(getattr(trial, suggest)(f"layer_{i}_rank", 2, 16) for i in range(n_layers)))

    study = optuna.create_study(sampler=RankAdaptorSampler(ranks=ranks, prior=None, seed=0))
    study.optimize(objective, n_trials=3)
    assert sum(message in line for line in logged(log)) == 1
    with pytest.raises(ValueError, match=f"no rank parameters.*{message}"):
        recommend(study)


def test_a_range_that_changed_is_said(log):
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    for high, n in ((64, 8), (4, 1)):
        study.optimize(lambda t, high=high: float(sum(t.suggest_int(f"r_{i}", 2, high) for i in range(4))), n_trials=n)
    assert any("their ranges changed" in line for line in logged(log))


PARAMETERS_BESIDE_THE_RANKS = """
import optuna
from rankadaptor_optuna import RankAdaptorSampler
optuna.logging.set_verbosity(optuna.logging.ERROR)
def objective(trial):
    if trial.suggest_categorical("method", ["lora", "full"]) == "full":
        return sum(trial.suggest_float(name, 0, 1) for name in ("one", "two", "three"))
    return float(sum(trial.suggest_int(f"r_{i}", 2, 8) for i in range(4)))
study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0))
study.optimize(objective, n_trials=20)
print([sorted(trial.params.items()) for trial in study.trials])
"""


def test_proposals_beside_the_ranks_are_the_same_in_any_process():
    command = [sys.executable, "-c", PARAMETERS_BESIDE_THE_RANKS]
    printed = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
