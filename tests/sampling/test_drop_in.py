from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, recommend
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from tests.sampling.common import SENSITIVITY, SPACE, anyones, is_uniform, new_study, objective, ranks_of, score


@pytest.mark.parametrize("name", ["layer_{}_rank", "r_l{}", "model.layers.{}.mlp.r", "rank_attn_{}"])
def test_it_goes_on_where_anothers_study_stopped(name):
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=0))
    study.optimize(anyones(name), n_trials=15)
    before = [t.value for t in study.trials]
    study.sampler = RankAdaptorSampler(prior=None, seed=0)
    study.optimize(anyones(name), n_trials=15)
    after = [t.value for t in study.trials[15:]]
    assert np.mean(after) > np.mean(before[-10:]) + 10
    assert max(after) > max(before)


@pytest.mark.parametrize("name", ["model.layers.{}.mlp.r", "rank_attn_{}", "rank_categorical_{}"])
def test_anyones_ranks_are_learned_along_the_depth_at_once(name):
    def run(trial):
        ranks = {
            i: trial.suggest_categorical(name.format(i), [16, 4, 8, 2])
            if "categorical" in name
            else trial.suggest_int(name.format(i), 2, 16, step=2)
            for i in range(24)
        }
        return float(sum((1 if layer < 12 else -1) * np.log2(1 + rank) for layer, rank in ranks.items()))

    ahead = []
    for seed in range(4):
        study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=seed))
        study.optimize(run, n_trials=12)
        best = study.best_value
        study.sampler = RankAdaptorSampler(prior=None, seed=seed)
        study.optimize(run, n_trials=2)
        ahead.append(min(t.value for t in study.trials[12:]) - best)
    assert np.mean(ahead) > 5


def test_values_of_a_study_with_changed_ranges_are_learned_from():
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    for high in (8, 12):
        study.optimize(
            lambda trial, high=high: float(score({i: trial.suggest_int(f"r_{i}", 2, high) for i in range(4)})),
            n_trials=6,
        )
    assert all(t.state is TrialState.COMPLETE for t in study.trials)
    assert max(v for t in study.trials[6:] for v in t.params.values()) > 8


def test_other_parameters_are_searched_beside_the_spaces_ranks():
    def run(trial):
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        return objective(trial) - 20 * abs(np.log10(rate) + 3)

    study = new_study()
    study.optimize(run, n_trials=25)
    off = [abs(np.log10(t.params["rate"]) + 3) for t in study.trials]
    assert np.mean(off[15:]) < 0.5 < np.mean(off[:5])
    assert is_uniform(study.trials[0])
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)


def test_conditional_parameters_are_sampled_beside_what_all_trials_have_in_common():
    def run(trial):
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        if trial.suggest_categorical("adapter", ["lora", "prefix"]) == "prefix":
            return -20.0 - trial.suggest_int("prefix_length", 1, 64) / 64
        ranks = {i: trial.suggest_int(f"r_{i}", 2, 16, step=2) for i in range(4)}
        return float(score(ranks) - 20 * abs(np.log10(rate) + 3))

    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    study.optimize(run, n_trials=40)
    late = study.trials[20:]
    assert {t.params["adapter"] for t in study.trials[:20]} == {"lora", "prefix"}
    assert np.mean([t.params["adapter"] == "lora" for t in late]) > 0.7
    assert np.mean([abs(np.log10(t.params["rate"]) + 3) for t in late]) < 0.5
    assert len({t.params["r_0"] for t in late if "r_0" in t.params}) > 3


def test_without_a_space_sensitivities_are_those_of_the_parameters_names():
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=3)
    study.set_user_attr(SENSITIVITY_ATTR, SENSITIVITY)
    assert recommend(study, prior=None).params != recommend(without_sensitivity(study), prior=None).params


def without_sensitivity(study):
    other = optuna.create_study(direction="maximize")
    other.add_trials(study.trials)
    return other
