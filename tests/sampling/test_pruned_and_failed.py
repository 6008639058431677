from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.pruners import HyperbandPruner
from optuna.trial import TrialState, create_trial

from rankadaptor_optuna import RankAdaptorSampler, recommend
from tests.sampling.common import (
    SPACE,
    new_study,
    objective,
    ranks_of,
    score,
)


def broken(kind):
    """Trials that fail, diverge or are pruned among good ones."""

    def run(trial):
        value = objective(trial)
        if trial.number % 2:
            if kind == "raises":
                raise RuntimeError
            if kind == "pruned":
                trial.report(-1e9, step=0)
                raise optuna.TrialPruned
            return float(kind)
        return value

    return run


@pytest.mark.parametrize("kind", ["raises", "pruned", "nan", "-inf", "inf"])
def test_trials_without_a_usable_score_do_not_stop_or_mislead_the_search(kind):
    study = new_study()
    study.optimize(broken(kind), n_trials=20, catch=RuntimeError)
    good = [score(ranks_of(t)) for t in study.trials[10:]]
    assert np.mean(good) > score(SPACE.uniform())
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)


def ups_and_downs(ranks):
    """Shallow layers need rank, deep ones are better off without."""
    return float(sum((1 if layer < 4 else -1) * np.log2(1 + rank) for layer, rank in ranks.items()))


def deep_ranks_proposed(reports):
    """Mean rank of the deep layers in the next proposals, where only pruned trials had tried other ranks than 8."""
    study = new_study()
    rng = np.random.default_rng(0)
    for number in range(24):
        ranks = {layer: int(rng.choice(SPACE.candidates)) if layer < 4 or number >= 8 else 8 for layer in SPACE.layers}
        value = ups_and_downs(ranks)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if number < 8 else TrialState.PRUNED,
                value=value if number < 8 else None,
                params={SPACE.name(layer): rank for layer, rank in ranks.items()},
                distributions=SPACE.distributions(),
                intermediate_values={1: value / 2} if number < 8 or reports else {},
            )
        )
    proposed = [SPACE.suggest(study.ask()) for _ in range(6)]
    return np.mean([ranks[layer] for ranks in proposed for layer in range(4, 8)])


def test_reports_of_pruned_trials_show_where_not_to_search():
    assert deep_ranks_proposed(reports=True) < 5 < deep_ranks_proposed(reports=False)


@pytest.mark.parametrize("with_space", [True, False])
def test_it_works_under_hyperband(with_space):
    def run(trial):
        ranks = {i: trial.suggest_int(f"r_{i}", 2, 12, step=2) for i in range(8)} if not with_space else None
        value = ups_and_downs(ranks or SPACE.suggest(trial))
        for step in range(1, 10):
            trial.report(value * step / 9, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study = new_study(
        SPACE if with_space else None, study_name="s", pruner=HyperbandPruner(min_resource=1, max_resource=9)
    )
    study.optimize(run, n_trials=30)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    late = [ups_and_downs(dict(enumerate(t.params.values()))) for t in study.trials[20:]]
    assert np.mean(late) > 4


FAILURES = {
    "inf": lambda trial: float("inf"),
    "huge": lambda trial: 1e4,
    "raises": lambda trial: 1 / 0,
    "pruned": lambda trial: _pruned(),
}


def _pruned():
    raise optuna.TrialPruned


@pytest.mark.parametrize("kind", FAILURES)
def test_a_region_in_which_trials_fail_is_left_and_never_recommended(kind):
    """Ranks above a total of 100 fail: random search has 26 such trials of 40, TPE 17."""

    def objective(trial):
        ranks = [trial.suggest_int(f"layer_{i}_rank", 2, 16, step=2) for i in range(12)]
        return -np.log1p(ranks).sum() if sum(ranks) <= 100 else FAILURES[kind](trial)

    study = optuna.create_study(sampler=RankAdaptorSampler(seed=1))
    study.optimize(objective, n_trials=40, catch=ZeroDivisionError)
    totals = [sum(t.params.values()) for t in study.trials]
    assert sum(total > 100 for total in totals) <= 18
    assert sum(recommend(study).params.values()) <= 100


def test_a_learning_rate_beyond_a_cliff_is_left():
    """Random search has 30 diverged trials of 60, TPE 11."""

    def objective(trial):
        ranks = [trial.suggest_int(f"layer_{i}_rank", 2, 16, step=2) for i in range(12)]
        lr = np.log10(trial.suggest_float("lr", 1e-5, 1e-1, log=True))
        return 3 + 50 * (lr + 3) if lr > -3 else 3 + 0.1 * abs(lr + 3.5) - 0.01 * np.log1p(ranks).sum()

    study = optuna.create_study(sampler=RankAdaptorSampler(seed=0))
    study.optimize(objective, n_trials=40)
    assert sum(t.params["lr"] > 1e-3 for t in study.trials) <= 12
    assert recommend(study).params["lr"] <= 1e-3
