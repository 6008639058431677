from __future__ import annotations

import itertools

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.verification import Verifications
from tests.studies.common import HAS_SET_CONSTRAINT, conditional, score

SPACE = RankSpace(5, (2, 4, 8, 12), "uniform:4", costs=[1, 2, 3, 2, 1])
FEASIBLE = [ranks for ranks in map(enumerate, itertools.product(SPACE.candidates, repeat=5))]
FEASIBLE = [ranks for ranks in map(Ranks, FEASIBLE) if SPACE.is_feasible(ranks)]


def fitted(seed, signal=1.0):
    rng = np.random.default_rng(seed)
    weights = signal * rng.random(5)
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(SPACE, prior=None, seed=seed))
    study.optimize(
        lambda trial: (
            float(weights @ np.log2(1 + np.asarray([*SPACE.suggest(trial).values()]))) + 0.3 * rng.standard_normal()
        ),
        n_trials=12,
    )
    return FittedStudy(StudyReading(study), None)


def bound(fitted, params):
    return fitted.model.lower_bound(fitted.encode(params) - fitted.encode(fitted.uniform(params)))[0]


def safest(fitted, n):
    return fitted.safest(fitted.model, n, Verifications(fitted.reading, fitted.encoding.rank_names))


@pytest.mark.parametrize("seed", range(8))
def test_the_safest_configuration_has_the_best_lower_bound_of_all_within_the_budget(seed):
    study = fitted(seed)
    bounds = [bound(study, SPACE.to_params(ranks)) for ranks in FEASIBLE]
    few = safest(study, 1)
    assert bound(study, few[0]) == pytest.approx(max(0, *bounds))
    assert len(few) == 1 or bound(study, few[1]) < 0  # uniform goes before a configuration, not beside itself


def test_the_next_safest_configurations_are_others_within_the_budget():
    study = fitted(0, signal=3.0)
    few = safest(study, 6)
    bounds = [bound(study, params) for params in few]
    everything = sorted((bound(study, SPACE.to_params(ranks)) for ranks in FEASIBLE), reverse=True)
    assert len({tuple(params.values()) for params in few}) == 6
    assert all(SPACE.is_feasible(SPACE.to_ranks(params)) for params in few)
    assert bounds[0] == pytest.approx(everything[0])
    assert min(bounds) > everything[20]


def test_the_first_observations_are_those_of_the_earliest_trials():
    study = fitted(0)
    before = study.model.predict(study.encoding.grid.reference)[0]
    study.fit_first(5)
    assert len(study.model.targets) == 5
    study.fit_first(12)
    assert study.model.predict(study.encoding.grid.reference)[0] == before


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_parameters_beside_the_ranks_are_those_of_one_branch(seed):
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=seed))
    study.optimize(conditional, n_trials=25)
    conditional(optuna.trial.FixedTrial(recommend(study).params))


@pytest.mark.skipif(not HAS_SET_CONSTRAINT, reason="Optuna 4 has no names of constraints")
def test_parameters_beside_the_ranks_are_those_of_a_feasible_trial():
    def objective(trial):
        ranks = {i: trial.suggest_int(f"r_{i}", 2, 16, step=2) for i in range(5)}
        x = trial.suggest_float("x", 0, 1) if trial.number % 3 else 0.5
        trial.set_constraint("memory", x - 0.6)
        return float(score(ranks) + 200 * x)

    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    study.optimize(objective, n_trials=20)
    assert recommend(study).params.get("x", 0.5) <= 0.6


def test_layers_of_a_single_rank_keep_their_adapters():
    def objective(trial):
        return float(
            score({i: trial.suggest_int(f"layer_{i}_rank", *((8, 8) if i in (0, 5) else (2, 16))) for i in range(6)})
        )

    for sampler in (TPESampler(seed=0), RankAdaptorSampler(prior=None, seed=0)):
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(objective, n_trials=12)
        found = recommend(study)
        assert found.lora_arguments["layers_to_transform"] == list(range(6))
        assert found.ranks[0] == found.ranks[5] == 8
        assert found.cost == sum(found.ranks.values())


@pytest.mark.parametrize("choices", [[0, 8], [0, 1]])
def test_adapters_that_are_on_or_off_are_compared_with_all_on(choices):
    def objective(trial):
        return float(score({i: trial.suggest_categorical(f"layer_{i}_rank", choices) for i in range(4)}))

    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=0))
    study.optimize(objective, n_trials=12)
    assert set(recommend(study).ranks.values()) == {choices[1]}
