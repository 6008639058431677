from __future__ import annotations

import math

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler
from rankadaptor_optuna.database.attributes import PROPOSAL_ATTR
from rankadaptor_optuna.sampling import observations
from rankadaptor_optuna.sampling.encoding import Encoding
from tests.sampling.common import RANK, X, add, encoded, history_of


def test_each_trial_is_encoded_once(monkeypatch):
    study = optuna.create_study()
    history = history_of(study)
    encode, n_encoded = encoded(study, history).model.encode, []
    monkeypatch.setattr(encoded(study, history).model, "encode", lambda *a: n_encoded.append(len(a[0])) or encode(*a))
    for n in range(4):
        add(study, value=n)
        history.refresh()
        assert len(encoded(study, history).observations().features) == n + 1
    assert n_encoded == [1] * 4


def test_another_search_space_is_encoded_anew():
    study = optuna.create_study()
    add(study, {"x": 0.2, "y": 0.3}, 1)
    history = history_of(study)
    assert encoded(study, history) is encoded(study, history)
    wider = encoded(study, history, {"x": X, "y": X})
    assert len(wider.observations().trials) == 1
    assert wider.observations().features.shape[1] > encoded(study, history).observations().features.shape[1]


def test_trials_from_before_a_range_changed_are_learned_from():
    study = optuna.create_study()
    params = {"r_0": 2, "r_1": 2, "r_2": 2, "x": 0.5}
    for high in (1, 2):
        ranges = dict.fromkeys(params, RANK) | {"x": FloatDistribution(0, high)}
        add(study, params, high, distributions=ranges)
    space = history_of(study).search_space(None, None)
    assert space == ranges
    assert len(encoded(study, space=space).observations().trials) == 2


def test_failed_and_infinite_trials_and_those_that_lack_a_parameter_are_left_out_of_the_data():
    study = optuna.create_study()
    add(study, value=1)
    add(study, value=math.inf)
    add(study, state=TrialState.FAIL)
    add(study, {"y": 0.5}, 2)
    assert [t.number for t in encoded(study).observations().trials] == [0]


def test_the_ranks_of_every_ended_trial_count_as_tried():
    names = ["r_0", "r_1", "r_2"]
    study = optuna.create_study()
    add(study, dict.fromkeys(names, 2), 1)
    add(study, dict.fromkeys(names, 4), state=TrialState.FAIL)
    add(study, {"r_0": 6}, state=TrialState.FAIL, attrs={PROPOSAL_ATTR: [6, 8, 6]})
    add(study, {"r_0": 6}, state=TrialState.FAIL)
    tried = encoded(study, space=dict.fromkeys(names, RANK)).tried
    assert tried == {
        (2, 2, 2): [TrialState.COMPLETE],
        (4, 4, 4): [TrialState.FAIL],
        (6, 8, 6): [TrialState.FAIL],
    }


def constraint(*given):
    """Values of the constraint as the model gets them, where trials were given these (None for none)."""
    study = optuna.create_study()
    for value in given:
        add(study, value=1, attrs=None if value is None else {"constraints": [value]})
    (found,) = encoded(study).constraints().values()
    return found[1].tolist()


def test_constraints_are_known_by_their_number_where_a_sampler_set_them():
    study = optuna.create_study()
    for second in (0.5, -2.0, 0.0):
        add(study, value=1, attrs={"constraints": [-1.0, second]})
    found = {name: values.tolist() for name, (_, values) in encoded(study).constraints().items()}
    assert found == {"0": [-1, -1, -1], "1": [0.5, -2, 0]}
    assert encoded(study).observations().feasible.tolist() == [False, True, True]


@pytest.mark.skipif(not hasattr(optuna.trial.Trial, "set_constraint"), reason="Optuna 4 has no set_constraint")
def test_constraints_are_known_by_their_name_where_the_objective_set_them():
    study = optuna.create_study()
    for value in (3.0, -1.0):
        trial = study.ask({"x": X})
        trial.set_constraint("memory", value)
        study.tell(trial, 1)
    add(study, value=1)
    ((name, (_, values)),) = encoded(study).constraints().items()
    assert (name, values.tolist()) == ("memory", [3, -1])
    assert encoded(study).observations().feasible.tolist() == [False, True, True]


def test_where_only_violations_are_given_the_other_trials_count_as_keeping_the_constraint():
    assert constraint(None, 1, 3) == [-2, 1, 3]
    assert constraint(0, 1, 3) == [-2, 1, 3]


def test_where_kept_constraints_are_given_too_a_trial_without_one_says_nothing():
    assert constraint(None, 1, -3) == [1, -3]


def test_a_trial_that_was_pruned_before_its_constraint_was_known_says_nothing():
    study = optuna.create_study()
    add(study, attrs={"constraints": [2.0]})
    add(study)
    add(study, value=1)
    ((_, values),) = encoded(study).constraints().values()
    assert values.tolist() == [2, -2]


def test_a_constraint_far_out_does_not_set_the_scale():
    assert constraint(-1, 2, -1, math.inf) == [-1, 2, -1, 2]
    assert constraint(math.inf, None) == [1, -1]
    assert constraint(-1, 1, -1, 1e9) == [-1, 1, -1, 5]


def test_a_constraint_that_is_always_just_kept_is_none():
    study = optuna.create_study()
    add(study, value=1, attrs={"constraints": [0.0]})
    assert encoded(study).constraints() == {}


def test_constraints_are_learned_from_trials_that_have_no_value():
    study = optuna.create_study()
    add(study, {"x": 0.1}, math.inf, attrs={"constraints": [1.0]})
    add(study, {"x": 0.2}, attrs={"constraints": [2.0]})
    add(study, {"x": 0.3}, 1, attrs={"constraints": [-1.0]})
    add(study, {"x": 0.4}, state=TrialState.FAIL, attrs={"constraints": [3.0]})
    ((rows, values),) = encoded(study).constraints().values()
    assert values.tolist() == [1, 2, -1, 3]
    assert len({tuple(row) for row in rows.tolist()}) == 4
    assert len(encoded(study).observations().trials) == 1


def test_the_margin_is_the_share_of_the_latest_trials_that_failed_or_broke_a_constraint():
    study = optuna.create_study()
    for i in range(8):
        add(study, {"x": i / 20}, i, attrs={"constraints": [1.0]})
    assert encoded(study).margin == 1
    for i in range(6):
        add(study, {"x": i / 20}, i, attrs={"constraints": [-1.0]})
    add(study, {"x": 0.9}, state=TrialState.FAIL)
    assert encoded(study).margin == 0.4


def test_outcomes_that_are_not_finite_or_far_below_the_others_are_failures():
    study = optuna.create_study()
    for value in (1.0, 1.1, 0.9, 1.2, 1e3, math.inf, 1.7e308):
        add(study, {"x": 0.1}, value)
    add(study, {"x": 0.2}, state=TrialState.FAIL)
    add(study, {"x": 0.3}, state=TrialState.PRUNED)
    add(study, {"x": 0.4}, state=TrialState.PRUNED, reports={1: 1.0})
    assert encoded(study).failed.tolist() == [False] * 4 + [True] * 5 + [False]
    assert len(encoded(study).observations().trials) == 5  # the finite ones


def test_without_failures_nothing_is_forbidden():
    study = optuna.create_study()
    add(study, {"x": 0.1}, 1.0)
    assert encoded(study).failure(0.5) is None


def test_scores_within_a_narrowed_range_have_not_diverged():
    """Better scores out of reach make no failures of all that is left."""
    study = optuna.create_study(direction="maximize")
    for i in range(15):
        add(study, {"x": 0.9}, 60 + 0.1 * (i % 3), distributions={"x": X})
    for i in range(4):
        add(study, {"x": 0.1}, 30.0 + i / 10, distributions={"x": FloatDistribution(0, 0.5)})
    assert encoded(study).failed.sum() == 4
    history = history_of(study)
    narrow = Encoding({"x": FloatDistribution(0, 0.5)})
    assert not history.encoded(narrow, RankAdaptorSampler(prior=None)._new_model).failed.any()


def test_of_many_trials_the_latest_bad_and_good_teach_the_model_of_failures(monkeypatch):
    study = optuna.create_study()
    for i in range(40):
        add(study, {"x": i / 40}, math.inf if i % 4 == 0 else 1.0 + i / 100)
    whole = encoded(study).failure_model
    monkeypatch.setattr(observations, "_MOST_MODELLED", 8)
    seen = {}
    trials = encoded(study)
    monkeypatch.setattr(trials.model, "failures", lambda *args: seen.update(zip("xfs", args, strict=True)) or whole)
    assert trials.failure_model is whole
    assert seen["f"].sum() == (~seen["f"]).sum() == 8
    assert seen["s"] == pytest.approx(math.log((8 / 30) / (8 / 10)))
