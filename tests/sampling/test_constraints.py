from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler

from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from tests.sampling.common import (
    HAS_SET_CONSTRAINT,
    SPACE,
    broken_constraints,
    constrain,
    new_study,
    objective,
    ranks_of,
    score,
)


def limited(given, seed=0, *, prune=False, n_trials=24):
    """Share of late trials whose deep ranks exceed a limit that the objective alone would pass, and the best within."""

    def over(ranks):
        return sum(ranks[layer] for layer in (5, 6, 7)) - 24

    def run(trial):
        ranks = SPACE.suggest(trial)
        if (value := given(over(ranks))) is not None:
            constrain(trial, value)
        if prune and over(ranks) > 0:
            raise optuna.TrialPruned
        return float(score(ranks))

    study = new_study(seed=seed)
    study.optimize(run, n_trials=n_trials)
    tried = [ranks_of(t) for t in study.trials]
    assert all(map(SPACE.is_feasible, tried))
    return np.mean([over(ranks) > 0 for ranks in tried[10:]]), max(score(r) for r in tried if over(r) <= 0)


CONSTRAINTS = {
    "by how much": float,
    "yes or no": lambda over: 1.0 if over > 0 else -1.0,
    "only violations": lambda over: float(over) if over > 0 else None,
}


@pytest.mark.parametrize("given", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_infeasible_ranks_are_avoided_without_giving_up_the_search(given):
    kept = [limited(given, seed) for seed in range(3)]
    assert np.mean([share for share, _ in kept]) < 0.65
    assert np.mean([best for _, best in kept]) > score(SPACE.uniform())


def test_without_a_constraint_most_late_proposals_are_infeasible():
    assert limited(lambda over: None)[0] > 0.8


def test_trials_that_are_pruned_at_once_are_avoided_with_a_constraint_and_without():
    assert limited(float, prune=True)[0] < 0.3
    assert limited(lambda over: None, prune=True)[0] < 0.5


def test_infeasible_values_of_other_parameters_are_avoided():
    def run(trial):
        rate = np.log10(trial.suggest_float("rate", 1e-5, 1e-1, log=True))
        constrain(trial, rate + 3)  # diverges beyond 1e-3
        return objective(trial) + 10 * rate

    highest = []
    for seed in range(2):
        study = new_study(seed=seed)
        study.optimize(run, n_trials=25)
        rates = np.log10([t.params["rate"] for t in study.trials[10:]])
        assert np.mean(rates > -3) < 0.3
        highest.append(rates[rates <= -3].max())
    assert min(highest) > -3.2


@pytest.mark.skipif(not HAS_SET_CONSTRAINT, reason="Optuna 4 does not mark trials over the budget")
def test_trials_of_another_sampler_over_the_budget_do_not_narrow_the_search():
    proposed = []
    for space in (SPACE, RankSpace(8)):  # the same ranks, marked as infeasible or not
        study = new_study()
        study.sampler = RandomSampler(seed=0)
        study.optimize(lambda trial, space=space: float(score(space.suggest(trial))), n_trials=8)
        study.sampler = RankAdaptorSampler(SPACE, prior=None, seed=0)
        proposed.append([SPACE.suggest(study.ask()) for _ in range(4)])
        assert any(broken_constraints(study)) is (space is SPACE)
    assert proposed[0] == proposed[1]
