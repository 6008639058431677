from __future__ import annotations

import numpy as np
import optuna
import pytest

from rankadaptor_optuna.database.attributes import VERIFY_ATTR
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.verification import Verifications, verification_seeds

A, B, C = ({"x": x} for x in (0.1, 0.2, 0.3))


def verified(scores, direction="maximize"):
    """A study with the given (configuration, seed, value) as its verification trials."""
    study = optuna.create_study(direction=direction)
    for params, seed, value in scores:
        study.enqueue_trial(params, user_attrs={VERIFY_ATTR: seed})
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, value)
    return study


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_differences_are_paired_by_seed_and_higher_is_better(direction):
    study = verified([(A, 1, 5.0), (A, 2, 7.0), (A, 3, 9.0), (B, 1, 4.0), (B, 3, 5.0)], direction)
    found = Verifications(StudyReading(study), ["x"])
    assert found.differences((0.1,), (0.2,)) == ([1.0, 4.0] if direction == "maximize" else [-1.0, -4.0])


def test_a_run_that_happened_twice_counts_once():
    study = verified([(A, 1, 5.0), (A, 1, 7.0), (B, 1, 4.0)])
    assert Verifications(StudyReading(study), ["x"]).scores == {(0.1,): {1: 6.0}, (0.2,): {1: 4.0}}


def test_ordinary_and_failed_trials_verify_nothing():
    study = verified([(A, 1, float("nan"))])
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert Verifications(StudyReading(study), ["x"]).scores == {}


def test_contrasts_do_not_see_what_a_seed_adds_to_all_of_its_scores():
    values, contrasts = {0.1: 1.0, 0.2: 2.5, 0.3: 2.0}, []
    for offsets in ((0.0, 0.0), (100.0, -30.0)):
        runs = [(p, seed, values[p["x"]] + offsets[seed - 1]) for seed in (1, 2) for p in (A, B, C)]
        rows, scores = Verifications(StudyReading(verified(runs)), ["x"]).contrasts(
            lambda key: np.asarray([1.0, key[0]]), 10.0
        )
        contrasts.append(scores)
        assert rows.shape == (4, 2)
        assert rows[:, 0] == pytest.approx(0)
        assert (scores**2).sum() == pytest.approx(2 * 3 * np.var([*values.values()]))
    assert contrasts[0] == pytest.approx(contrasts[1])


def test_a_diverged_run_does_not_set_the_scale_of_the_contrasts():
    runs = [(A, 1, 1.0), (B, 1, 2.0), (C, 1, -1e6)]
    scores = Verifications(StudyReading(verified(runs)), ["x"]).contrasts(lambda key: np.ones(1), 10.0)[1]
    assert np.abs(scores).max() < 10


def test_seeds_are_the_same_each_time_and_more_of_them_go_on_after_the_others():
    assert verification_seeds(3)[:2] == verification_seeds(2)
    assert len(set(verification_seeds(5))) == 5
