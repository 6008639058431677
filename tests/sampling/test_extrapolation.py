from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from rankadaptor_optuna.database.attributes import ITEMS_ATTR
from tests.sampling.common import X, add, encoded, history_of


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
    noise = (1 + 0.5 / 3) * np.var([1, 2, 6])  # residuals are the deviations from the mean
    assert extrapolated(study, at_0=4.0) == pytest.approx((3, noise * (1 + 1 / 3 + 3**2)))


def test_value_and_variance_are_those_of_the_regularised_regression():
    x, y = np.asarray([0.0, 1.0, 2.0, 5.0]), np.asarray([1.0, 4.0, 3.0, 7.0])
    study = optuna.create_study()
    for report, value in zip(x.tolist(), y.tolist(), strict=True):
        add(study, value=value, reports={3: report})
    squares = ((x - 2) ** 2).sum()
    slope = (4 * ((x - 2) @ y) / squares + 2 * y.std() / x.std()) / 6
    noise = ((y - y.mean() - slope * (x - 2)) ** 2).sum() / 4 + y.var() / 8
    expected = y.mean() + slope * 4, noise * (1 + 1 / 4 + 4**2 / squares)
    assert extrapolated(study, at_3=6.0) == pytest.approx(expected)


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
