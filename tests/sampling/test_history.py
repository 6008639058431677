from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner, _filter_study
from optuna.trial import TrialState, create_trial

from rankadaptor_optuna import RankAdaptorSampler
from rankadaptor_optuna.attributes import ITEMS_ATTR, PROPOSAL_ATTR, SENSITIVITY_ATTR, VERIFY_ATTR
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.sampling.observations import Observations
from rankadaptor_optuna.sampling.trials import announced_ranks, verification_seed

X = FloatDistribution(0, 1)
RANK = IntDistribution(2, 12, step=2)


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


def test_each_trial_is_read_once():
    study = optuna.create_study()
    history = history_of(study)
    for n in range(4):
        add(study, value=n)
        history.refresh()
        history.refresh()
    assert [t.number for t in history.finished] == [0, 1, 2, 3]


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
    assert [*history.common] == ["y"]


def test_of_a_changed_range_the_latest_is_kept_whoever_finished_first():
    ranges = [FloatDistribution(0, high) for high in (1, 2, 3)]
    study = optuna.create_study()
    trials = [study.ask({"x": distribution}) for distribution in ranges]
    history = history_of(study)
    for i in (2, 0, 1):
        study.tell(trials[i], 0.0)
        history.refresh()
    assert history.searched == history_of(study).searched == {"x": ranges[2]}


def test_trials_from_before_a_range_changed_are_learned_from():
    study = optuna.create_study()
    for high in (1, 2):
        add(study, {"x": 0.5}, high, distributions={"x": FloatDistribution(0, high)})
    assert len(encoded(study, space=history_of(study).searched).observations().trials) == 2


def test_common_are_the_parameters_that_every_completed_trial_has():
    study = optuna.create_study()
    add(study, {"x": 0.1, "y": 0.2}, 1)
    for state in (TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING):
        add(study, {"z": 0.1}, state=state)
    assert history_of(study).common.keys() == {"x", "y"}
    add(study, {"y": 0.1, "z": 0.2}, 1)
    assert history_of(study).common.keys() == {"y"}


def test_parameters_of_one_value_are_not_searched():
    study = optuna.create_study()
    add(study, {"x": 0.1, "y": 1.0}, 1, distributions={"x": X, "y": FloatDistribution(1, 1)})
    assert history_of(study).searched == {"x": X}


def test_the_order_in_which_a_trial_asked_for_its_parameters_does_not_matter():
    studies = [optuna.create_study() for _ in range(2)]
    for study, names in zip(studies, ("xyz", "zxy"), strict=True):
        add(study, dict.fromkeys(names, 0.5), 1)
    assert [[*history_of(study).searched] for study in studies] == [["x", "y", "z"]] * 2


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


def test_the_ranks_that_a_trial_has_go_before_those_it_announced():
    study = optuna.create_study()
    add(study, {"r_0": 2, "r_1": 4}, 1, attrs={PROPOSAL_ATTR: [6, 6]})
    (trial,) = study.trials
    assert announced_ranks(trial, ["r_0", "r_1"]) == (2, 4)
    assert announced_ranks(trial, ["r_0", "r_2"]) == (6, 6)
    assert announced_ranks(trial, ["r_0", "r_1", "r_2"]) is None
    assert announced_ranks(trial, []) is None


@pytest.mark.parametrize("slope", [-1.0, -0.1])
def test_a_trial_pruned_for_its_bad_report_is_never_taken_for_the_best(slope):
    """A few completed trials whose final values fell with their reports, by chance."""
    study = reported(3, slope=slope)
    finished = [t.value for t in study.trials]
    worst = max(t.intermediate_values[3] for t in study.trials)
    assert extrapolated(study, at_3=worst + 10)[0] >= np.mean(finished) - 1e-9


def reported(n=6, *, noise=0.0, step=3, slope=3.0):
    """Completed trials whose final value is ``slope`` times the report at ``step``, plus 2."""
    study = optuna.create_study()
    rng = np.random.default_rng(0)
    for report in np.linspace(0, 1, n):
        value = float(slope * report + 2 + noise * rng.standard_normal())
        add(study, value=value, reports={0: 5.0, step: float(report), step + 1: -report})
    return study


def extrapolated(study, **reports):
    add(study, reports={int(step.removeprefix("at_")): value for step, value in reports.items()})
    data = encoded(study).observations()
    assert data.variance[:-1].max(initial=0) == 0
    return data.values[-1, 0], data.variance[-1]


@pytest.mark.parametrize("report", [0.4, 1.5])
def test_a_pruned_trial_gets_the_final_value_that_goes_with_its_last_report(report):
    value, variance = extrapolated(reported(slope=3.0), at_0=5.0, at_3=report)
    assert value == pytest.approx(3 * report + 2)
    assert variance > 0


def test_each_pruned_trial_is_compared_at_its_own_last_step():
    study = reported()
    add(study, reports={3: 0.5})
    add(study, reports={3: 0.0, 4: -0.5})
    assert encoded(study).observations().values[-2:, 0] == pytest.approx([3.5, 3.5])


def test_the_further_a_report_is_from_the_others_the_less_certain_its_value():
    middle, edge, far = (extrapolated(reported(noise=0.1), at_3=report)[1] for report in (0.5, 1.0, 3.0))
    assert middle < edge < far


def test_the_less_reports_say_of_final_values_the_less_certain_these_are():
    variances = [extrapolated(reported(20, noise=noise), at_3=0.5)[1] for noise in (0, 0.3, 1)]
    assert variances == sorted(variances)
    assert variances[2] == pytest.approx(1, rel=0.9)


def test_a_few_trials_on_a_line_do_not_make_a_certain_value():
    few, many = (extrapolated(reported(n), at_3=0.5)[1] for n in (3, 30))
    assert few > 5 * many > 0


def test_reports_that_are_all_alike_give_the_mean():
    study = optuna.create_study()
    for value in (1, 2, 6):
        add(study, value=value, reports={0: 1.0})
    assert extrapolated(study, at_0=1.0)[0] == pytest.approx(3)


@pytest.mark.parametrize(
    ("n_completed", "reports"),
    [(2, {3: 0.5}), (6, {2: 0.5}), (6, {}), (6, {3: math.nan}), (6, {3: 0.5, 4: math.inf})],
    ids=["two comparable", "no comparable step", "no report", "nan", "inf"],
)
def test_a_pruned_trial_that_cannot_be_compared_is_left_out(n_completed, reports):
    study = reported(n_completed)
    add(study, reports=reports)
    assert [t.number for t in encoded(study).observations().trials] == [*range(n_completed)]


def test_a_trial_stopped_on_easy_items_gets_the_score_that_all_items_would_give():
    study, easiness = optuna.create_study(), np.asarray([0.0, 0.5, 6.0, 9.0])
    rng = np.random.default_rng(0)
    for level in np.linspace(0, 1, 8):
        items = level + easiness + 0.1 * rng.standard_normal(4)
        add_items(study, dict(enumerate(items.tolist())), float(items.mean()))
    add_items(study, {1: 2.5, 0: 2.0})  # each 2 above level 0, though far below the others' scores
    data = encoded(study).observations()
    assert data.values[-1, 0] == pytest.approx(2 + easiness.mean(), abs=0.5)
    assert data.values[-1, 0] > data.values[:-1, 0].max()
    assert data.variance[-1] > 0


def test_items_that_the_others_have_not_all_reported_say_nothing():
    study = optuna.create_study()
    for level in (0.0, 1.0, 2.0):
        add_items(study, {0: level, 1: level}, level)
    add_items(study, {0: 1.0, 2: 1.0})
    assert len(encoded(study).observations().trials) == 3


def add_items(study, reports, value=None):
    """A trial that reported items: completed where it has a value, else pruned."""
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
            value=value,
            params={"x": 0.5},
            distributions={"x": X},
            intermediate_values=reports,
            user_attrs={ITEMS_ATTR: True},
        )
    )


def test_a_later_completed_trial_makes_earlier_pruned_ones_comparable():
    study = reported(2)
    add(study, reports={3: 0.5})
    history = history_of(study)
    assert len(encoded(study, history).observations().trials) == 2
    add(study, value=3.5, reports={3: 0.5})
    history.refresh()
    assert encoded(study, history).observations().values[2] == pytest.approx(3.5)


def test_pruned_trials_of_several_objectives_are_left_out():
    study = optuna.create_study(directions=["minimize", "maximize"])
    add(study, reports={0: 1.0})
    assert encoded(study).observations().values.shape == (0, 2)
    for _ in range(3):
        add(study, value=[1, 2], reports={0: 1.0})
    assert encoded(study).observations().values.tolist() == [[1, 2]] * 3


def constraint(*given):
    """Values of the constraint as the model gets them, where trials were given these (None for none)."""
    study = optuna.create_study()
    for value in given:
        add(study, value=1, attrs=None if value is None else {"constraints": [value]})
    (found,) = encoded(study).constraints().values()
    return found[1].tolist()


def test_constraints_are_known_by_their_number_where_a_sampler_set_them():
    study = optuna.create_study()
    for second in (2.0, -2.0):
        add(study, value=1, attrs={"constraints": [-1.0, second]})
    found = {name: values.tolist() for name, (_, values) in encoded(study).constraints().items()}
    assert found == {"0": [-1, -1], "1": [2, -2]}
    assert encoded(study).observations().feasible.tolist() == [False, True]


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
    assert values.tolist() == [1, 2, -1]
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert len(encoded(study).observations().trials) == 1


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


def test_an_ordinary_trial_has_no_verification_seed():
    study = optuna.create_study()
    assert verification_seed(study.ask()) is None
    assert verification_seed(study.trials[0]) is None
    assert verification_seed(optuna.trial.FixedTrial({})) is None


def test_the_margin_is_the_share_of_the_latest_trials_that_broke_a_constraint():
    def margin(*kept):
        return Observations(np.zeros((0, 0)), np.zeros((0, 1)), np.zeros(0), [], np.asarray(kept, dtype=bool)).margin

    assert margin() == 0
    assert margin(False, True) == 0.5
    assert margin(*[False] * 8, *[True] * 7) == 0.3


def test_sensitivities_are_read_when_the_study_has_them():
    study = optuna.create_study()
    history = history_of(study)
    assert history.sensitivity == {}
    study.set_user_attr(SENSITIVITY_ATTR, {"r_0": 0.5})
    history.refresh()
    assert history.sensitivity == {"r_0": 0.5}
