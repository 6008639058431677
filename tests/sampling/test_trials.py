from __future__ import annotations

import optuna

from rankadaptor_optuna.database.attributes import PROPOSAL_ATTR
from rankadaptor_optuna.sampling.trials import announced_ranks, verification_seed
from tests.sampling.common import add


def test_the_ranks_that_a_trial_has_go_before_those_it_announced():
    study = optuna.create_study()
    add(study, {"r_0": 2, "r_1": 4}, 1, attrs={PROPOSAL_ATTR: [6, 6]})
    (trial,) = study.trials
    assert announced_ranks(trial, ["r_0", "r_1"]) == (2, 4)
    assert announced_ranks(trial, ["r_0", "r_2"]) == (6, 6)
    assert announced_ranks(trial, ["r_0", "r_1", "r_2"]) is None
    assert announced_ranks(trial, []) is None


def test_an_ordinary_trial_has_no_verification_seed():
    study = optuna.create_study()
    assert verification_seed(study.ask()) is None
    assert verification_seed(study.trials[0]) is None
    assert verification_seed(optuna.trial.FixedTrial({})) is None
