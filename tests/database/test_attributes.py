"""Anyone with access to a shared storage may write any attribute."""

from __future__ import annotations

import math

import optuna
import pytest

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.database.attributes import (
    CONVERGED_ATTR,
    PROPOSAL_ATTR,
    RECIPE_ATTR,
    SENSITIVITY_ATTR,
    SPACE_ATTR,
    VERIFY_ATTR,
)
from rankadaptor_optuna.studies.reading import StudyReading, study_space
from rankadaptor_optuna.views.study_view import StudyView

SPACE = RankSpace(4, (2, 4, 8), "uniform:4")
ODD = [None, 7, -1, 0.5, "abc", [], [1], {}, {"a": "b"}, [[1, 2]] * 4, ["a"] * 4, [math.nan] * 4, True]


def objective(trial):
    return sum((i + 1) * rank for i, rank in SPACE.suggest(trial).items())


@pytest.fixture
def study():
    study = optuna.create_study(sampler=RankAdaptorSampler(SPACE, seed=0), direction="maximize")
    study.optimize(objective, n_trials=3)
    return study


@pytest.mark.parametrize("value", ODD)
def test_proposals_of_others_stop_no_worker(study, value):
    other = study.ask()
    study._storage.set_trial_system_attr(other._trial_id, PROPOSAL_ATTR, value)
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials].count("COMPLETE") == 5


@pytest.mark.parametrize("key", [SENSITIVITY_ATTR, CONVERGED_ATTR, SPACE_ATTR])
@pytest.mark.parametrize("value", [*ODD, {"layer_00_rank": math.inf}, {"layer_00_rank": 1e308}])
def test_attributes_of_the_study_stop_no_worker(study, key, value):
    study.set_user_attr(key, value)
    study.optimize(objective, n_trials=1)
    assert recommend(study).ranks
    assert StudyView.of(StudyReading(study)).sensitivity is None


@pytest.mark.parametrize("value", ODD)
def test_a_verification_seed_that_is_none_leaves_an_ordinary_trial(study, value):
    study.enqueue_trial({}, user_attrs={VERIFY_ATTR: value})
    study.optimize(objective, n_trials=2)
    assert recommend(study).evidence.n_trials == 5 - (value == 7)


@pytest.mark.parametrize(
    "value", [*ODD[1:], {"format": 1, "n_layers": 10**12}, {"format": 1, "n_layers": 4, "costs": 3}]
)
def test_a_stored_space_that_is_none_is_refused_by_the_studys_name(study, value):
    study.set_user_attr(SPACE_ATTR, value)
    reader = optuna.create_study(study_name="other", sampler=optuna.samplers.RandomSampler())
    reader.set_user_attr(SPACE_ATTR, value)
    with pytest.raises(ValueError, match="the rank space stored with study 'other'"):
        study_space(reader)


@pytest.mark.parametrize("value", [7, "abc", [1], {"lora": 5}, {"lora": {"alpha": "x"}}, {"lora": {"targets": "qkv"}}])
def test_a_stored_recipe_that_is_none_is_refused_in_one_line(study, value):
    study.set_user_attr(RECIPE_ATTR, value)
    with pytest.raises(ValueError, match=r"rankadaptor:recipe|settings of LoRA|targets") as caught:
        recommend(study)
    assert "\n" not in str(caught.value)
