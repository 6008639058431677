from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner, _filter_study
from optuna.trial import TrialState

from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR, VERIFY_ATTR
from rankadaptor_optuna.sampling.trials import verification_seed
from tests.sampling.common import RANK, SPACE, X, add, encoded, history_of


def test_each_trial_is_read_once():
    study = optuna.create_study()
    history = history_of(study)
    for n in range(4):
        add(study, value=n)
        history.refresh()
        history.refresh()
    assert [t.number for t in history.finished] == [0, 1, 2, 3]
    assert history.finished[0] is history_of(study).finished[0]  # and not copied, which takes long


def test_waiting_and_running_trials_are_unfinished_until_they_end():
    study = optuna.create_study()
    running = study.ask()
    study.enqueue_trial({"x": 0.5})
    history = history_of(study)
    assert [t.state for t in history.unfinished] == [TrialState.RUNNING, TrialState.WAITING]
    study.tell(running, 1.0)
    history.refresh()
    assert [t.number for t in history.unfinished] == [1]
    assert [t.number for t in history.finished] == [0]


def test_trials_are_in_order_of_number_whoever_finished_first():
    study = optuna.create_study()
    trials = [study.ask({"x": X}) for _ in range(4)]
    history = history_of(study)
    for i in (2, 0, 3, 1):
        study.tell(trials[i], i)
        history.refresh()
        data = encoded(study, history).observations()
    assert [t.number for t in history.finished] == [2, 0, 3, 1]
    assert [t.number for t in data.trials] == data.values[:, 0].tolist() == [0, 1, 2, 3]
    assert data.features.tolist() == encoded(study).observations().features.tolist()


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING])
@pytest.mark.parametrize("n_then", [1, 3])
def test_a_new_study_with_the_id_of_a_deleted_one_has_its_own_trials(tmp_path, state, n_then):
    first = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="first")
    storage = first._storage
    for _ in range(2):
        add(first, {"x": 0.1}, 1 if state is TrialState.COMPLETE else None, state=state)
    history = history_of(first)
    optuna.delete_study(study_name="first", storage=storage)
    second = optuna.create_study(storage=storage, study_name="second")
    assert history.is_of(second)
    for _ in range(n_then):
        add(second, {"y": 0.9}, 2)
    history.refresh()
    assert [t.params for t in history.finished] == [{"y": 0.9}] * n_then
    assert history.unfinished == []


RANKS = {f"r_{i}": 2 for i in range(3)}


def searched(study, space=None, declared=None):
    return history_of(study).search_space(space, declared)


def test_of_a_changed_range_the_latest_is_kept_whoever_finished_first():
    ranges = [IntDistribution(2, high) for high in (4, 6, 8)]
    study = optuna.create_study()
    trials = [study.ask(dict.fromkeys(RANKS, distribution)) for distribution in ranges]
    history = history_of(study)
    for i in (2, 0, 1):
        study.tell(trials[i], 0.0)
        history.refresh()
    assert history.search_space(None, None) == searched(study) == dict.fromkeys(RANKS, ranges[2])


def test_parameters_that_all_trials_with_these_ranks_have_are_searched_with_them():
    study = optuna.create_study()
    add(study, {**RANKS, "x": 0.1, "y": 0.2}, 1)
    add(study, {**RANKS, "x": 0.1}, state=TrialState.PRUNED)
    for state in (TrialState.FAIL, TrialState.RUNNING):
        add(study, {"z": 0.1}, state=state)
    assert searched(study).keys() == {*RANKS, "x"}


def test_a_stray_trial_costs_nothing():
    study = optuna.create_study()
    add(study, {"x": 0.5}, 1)
    for _ in range(3):
        add(study, {**RANKS, "y": 0.2}, 1)
    add(study, {"x": 0.5}, 1)
    assert searched(study).keys() == {*RANKS, "y"}


@pytest.mark.parametrize(
    ("method", "values", "others"),
    [
        (CategoricalDistribution(["lora", "full", "dora"]), ["lora", "dora"], ["full", "full"]),
        (X, [0.6, 0.9], [0.1, 0.5]),
    ],
)
def test_a_parameter_that_decides_whether_there_are_ranks_is_not_searched_with_them(method, values, others):
    study = optuna.create_study()
    ranges = dict.fromkeys(RANKS, RANK) | {"method": method, "rate": X}
    for value, other, rate in zip(values, others, (0.1, 0.9), strict=True):
        add(study, {**RANKS, "method": value, "rate": rate}, 1, distributions=ranges)
        add(study, {"method": other, "rate": 0.5}, 1, distributions={"method": method, "rate": X})
    assert searched(study).keys() == {*RANKS, "rate"}


def test_of_a_space_that_changed_the_recent_half_counts():
    study = optuna.create_study()
    for _ in range(12):
        add(study, RANKS, 1)
    for n in range(12):
        add(study, {**RANKS, "r_3": 4, "x": 0.1}, 1)
        if n == 5:
            assert searched(study).keys() == RANKS.keys() | {"r_3", "x"}
    assert searched(study).keys() == {*RANKS, "r_3", "x"}


def test_the_ranks_that_most_trials_have_are_searched():
    study = optuna.create_study()
    for _ in range(3):
        add(study, RANKS, 1)
    add(study, {f"rank_{i}": 4 for i in range(4)}, 1)
    assert searched(study).keys() == RANKS.keys()


def test_where_all_trials_failed_their_parameters_are_searched():
    study = optuna.create_study()
    add(study, {**RANKS, "x": 0.1}, state=TrialState.FAIL)
    assert searched(study).keys() == {*RANKS, "x"}
    add(study, RANKS, 1)
    assert searched(study).keys() == RANKS.keys()


def test_the_parameters_of_a_space_are_searched_from_the_start():
    study = optuna.create_study()
    assert searched(study, SPACE) == SPACE.distributions()
    add(study, {"x": 0.1, **SPACE.to_params(SPACE.uniform())}, 1)
    assert searched(study, SPACE).keys() == {"x", *SPACE.names}


def test_parameters_of_one_value_are_not_searched():
    study = optuna.create_study()
    one = dict.fromkeys(RANKS, RANK) | {"y": FloatDistribution(1, 1)}
    add(study, {**RANKS, "y": 1.0}, 1, distributions=one)
    assert searched(study).keys() == RANKS.keys()


def test_the_order_in_which_a_trial_asked_for_its_parameters_does_not_matter():
    studies = [optuna.create_study() for _ in range(2)]
    for study, order in zip(studies, (1, -1), strict=True):
        add(study, dict([*RANKS.items(), ("x", 0.5)][::order]), 1)
    assert [[*searched(study)] for study in studies] == [[*RANKS, "x"]] * 2


def test_under_hyperband_the_trials_of_all_brackets_are_seen():
    study = optuna.create_study(study_name="s", pruner=HyperbandPruner(min_resource=1, max_resource=9))
    for _ in range(12):
        trial = study.ask({"x": X})
        trial.report(1.0, 1)
        trial.should_prune()  # sets up the brackets
        study.tell(trial, 1.0)
    bracket = _filter_study(study, study.trials[0])
    assert 0 < len(bracket.get_trials()) < 12
    assert len(history_of(bracket).finished) == 12


@pytest.mark.parametrize("running", [False, True])
def test_trials_that_verify_are_no_part_of_the_history(running):
    study = optuna.create_study()
    history = history_of(study)
    add(study, value=1.0)
    study.enqueue_trial({"x": 0.1}, user_attrs={VERIFY_ATTR: 7})
    history.refresh()
    verifying = study.ask()
    assert verification_seed(verifying) == 7
    if running:
        history.refresh()
        assert history.unfinished == []
    verifying.suggest_float("x", 0, 1)
    study.tell(verifying, 5.0)
    add(study, value=2.0)
    history.refresh()
    assert [t.number for t in history.finished] == [0, 2]
    assert encoded(study, history).observations().values[:, 0].tolist() == [1.0, 2.0]


def test_sensitivities_are_read_when_the_study_has_them():
    study = optuna.create_study()
    history = history_of(study)
    assert history.sensitivity == {}
    study.set_user_attr(SENSITIVITY_ATTR, {"r_0": 0.5})
    history.refresh()
    assert history.sensitivity == {"r_0": 0.5}
