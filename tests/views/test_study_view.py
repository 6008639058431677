from __future__ import annotations

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial

from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR, VERIFY_ATTR


def add(study, space, rank, value, **settings):
    """Adds a finished trial with one rank in all layers."""
    params = dict.fromkeys(space.distributions(), rank)
    study.add_trial(create_trial(params=params, distributions=space.distributions(), value=value, **settings))


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_follows_the_direction_and_skips_unfinished_trials(view_of, make_study, space, direction):
    study = make_study(2, direction=direction)
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL):
        study.add_trial(create_trial(state=state))
    for value in (-1.0, 5.0, 0.0):
        add(study, space, 4, value)
    view = view_of(study)
    assert view.numbers == (0, 1, 5, 6, 7)
    assert (view.n_pruned, view.n_failed) == (1, 2)
    assert view.ranks[-1].tolist() == [4] * 6
    assert view.labels == space.layers
    assert view.is_uniform.tolist() == [True, False, False, False, False]
    assert view.uniform_score == study.trials[0].value
    better = np.maximum if direction == "maximize" else np.minimum
    assert view.best.tolist() == better.accumulate(view.scores).tolist()
    assert view.best[-1] == study.best_value


def test_the_best_so_far_keeps_to_the_budget(view_of, make_study, space):
    study = make_study(0)
    for rank, value in ((12, 100.0), (8, 1.0), (4, 2.0)):
        add(study, space, rank, value)
    view = view_of(study)
    assert view.within_budget.tolist() == [False, True, True]
    assert np.isnan(view.best[0])
    assert view.best[1:].tolist() == [1.0, 2.0]


def test_verification_trials_are_left_out(view_of, make_study, space):
    study = make_study(3)
    add(study, space, 8, 1000.0, user_attrs={VERIFY_ATTR: 7})
    view = view_of(study)
    assert view.numbers == (0, 1, 2)
    assert view.scores.max() < 1000
    assert view.is_uniform.sum() == 1


def test_sensitivities_are_shares_of_their_sum(view_of, make_study, space):
    study = make_study(1)
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(space.distributions(), [1, 2, -1, 3, 4, 1], strict=True)))
    assert view_of(study).sensitivity == pytest.approx((0.1, 0.2, -0.1, 0.3, 0.4, 0.1))


@pytest.mark.parametrize("measured", [[1, 2, 3, 4, 5], [0] * 6, [1, -1, 0, 0, 0, 0]])
def test_sensitivities_of_some_layers_or_without_a_sum_are_unknown(view_of, make_study, space, measured):
    study = make_study(1)
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(space.distributions(), measured, strict=False)))
    assert view_of(study).sensitivity is None


def test_a_drop_in_study_has_neither_uniform_nor_profile(view_of, drop_in):
    view = view_of(drop_in())
    assert view.labels == tuple(range(8))
    assert view.uniform_ranks is view.uniform_score is view.profile is None
    assert view.within_budget.all()


def test_two_rank_parameters_of_one_layer_are_told_apart_by_name(view_of, drop_in):
    names = tuple(f"{kind}_{i}_r" for i in range(3) for kind in "ab")
    assert view_of(drop_in(names)).labels == names
