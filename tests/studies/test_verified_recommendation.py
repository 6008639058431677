from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from scipy.stats import t

from rankadaptor_optuna import RankAdaptorSampler, recommend, verification_seed
from rankadaptor_optuna.studies.reading import StudyReading
from tests.studies.common import (
    OFFSET,
    SPACE,
    any_study,
    conditional,
    configured,
    constrain,
    own_gain,
    score,
    searched,
    verifiable,
    verifying,
)


@pytest.mark.parametrize("k", [1, 3])
def test_verifying_enqueues_the_best_configurations_and_uniform_on_each_seed(k):
    study = searched()
    found = recommend(study, verify=k, seeds=2)
    waiting = verifying(study, TrialState.WAITING)
    runs = [(verification_seed(t), tuple(configured(t).values())) for t in waiting]
    seeds = sorted({seed for seed, _ in runs})
    configurations = {ranks for _, ranks in runs}
    assert len(runs) == len(set(runs)) == 2 * (k + 1)
    assert len(seeds) == 2
    assert len(configurations) == k + 1
    assert configured(waiting[0]) == found.params
    assert configured(waiting[1]) == {SPACE.name(layer): rank for layer, rank in SPACE.uniform().items()}
    assert [seed for seed, _ in runs] == sorted(seed for seed, _ in runs)  # pairs are complete early
    assert all(SPACE.is_feasible(dict(zip(SPACE.layers, ranks, strict=True))) for ranks in configurations)


def test_the_configurations_to_verify_are_about_as_good_as_the_recommended_one():
    study = searched()
    found = recommend(study, verify=4, seeds=2)
    ranks = {tuple(configured(t).values()) for t in verifying(study)} - {tuple(SPACE.uniform().values())}
    scores = [score(dict(zip(SPACE.layers, each, strict=True))) for each in ranks]
    assert min(scores) > score(found.ranks) - 0.3 * (score(found.ranks) - score(SPACE.uniform()))


def test_what_is_waiting_running_or_verified_is_not_enqueued_again():
    study = searched()
    recommend(study, verify=2, seeds=2)
    study.ask()  # runs
    study.optimize(verifiable(), n_trials=2)
    before = len(study.trials)
    recommend(study, verify=2, seeds=2)
    assert len(study.trials) == before
    study.optimize(verifiable(), n_trials=3)
    recommend(study, verify=2, seeds=2)
    assert len(study.trials) == before
    recommend(study, verify=2, seeds=3)
    assert len(verifying(study, TrialState.WAITING)) == 3  # the third seed only


def test_a_verification_that_failed_is_enqueued_again():
    study = searched()
    recommend(study, verify=1, seeds=2)
    study.optimize(lambda trial: float("nan") * SPACE.suggest(trial)[1], n_trials=4)
    recommend(study, verify=1, seeds=2)
    assert len(verifying(study, TrialState.WAITING)) == 4


def test_a_killed_workers_verification_is_run_again_on_its_seed():
    study = searched()
    recommend(study, verify=1, seeds=2)
    killed = study.ask()
    SPACE.suggest(killed)
    study.tell(killed, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[killed.number])
    study.optimize(verifiable(), n_trials=4)
    assert len(verifying(study, TrialState.COMPLETE)) == 4
    assert recommend(study).evidence.confirmed.n_seeds == 2


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_gain_on_fresh_seeds_is_confirmed_apart_from_the_predicted_one(direction):
    study = searched(direction=direction)
    before = recommend(study, verify=1).evidence
    assert before.confirmed is None
    study.optimize(verifiable(gain=0.5, direction=direction), n_trials=6)
    evidence = recommend(study).evidence
    assert (evidence.gain, evidence.interval, evidence.n_trials) == (before.gain, before.interval, 15)
    low, high = evidence.confirmed.interval
    assert 0 < low < evidence.confirmed.gain < high
    expected, _ = own_gain(study, recommend(study).ranks)
    assert evidence.confirmed.gain == pytest.approx(0.5 * expected, rel=0.3)
    assert (evidence.confirmed.n_seeds, evidence.confirmed.n_verified) == (3, 1)
    predicted = before.statement.partition(": ")[2]
    assert f": {predicted} Confirmed on 3 fresh seeds: measured gain +" in evidence.statement


def test_the_interval_is_wider_where_one_of_several_was_chosen():
    study = searched()
    recommend(study, verify=2)
    study.optimize(verifiable(), n_trials=9)
    found = recommend(study)
    ours, uniform = (
        [trial.value for trial in verifying(study) if trial.params == params]
        for params in (found.params, {SPACE.name(layer): rank for layer, rank in SPACE.uniform().items()})
    )
    half = t.ppf(1 - 0.025 / 2, 2) * np.std(np.subtract(ours, uniform), ddof=1) / np.sqrt(3)
    confirmed = found.evidence.confirmed
    assert confirmed.interval == pytest.approx((confirmed.gain - half, confirmed.gain + half))
    assert "The interval, not the gain, allows for the choice among 2 configurations." in found.evidence.statement


def test_a_confirmed_gain_is_that_of_the_same_seeds():
    study = searched()
    found = recommend(study, verify=1)
    study.optimize(verifiable(), n_trials=6)
    after = recommend(study)
    scores = {}
    for trial in verifying(study):
        scores.setdefault(trial.params == after.params, {})[verification_seed(trial)] = trial.value
    assert after.params == found.params
    differences = [scores[True][seed] - scores[False][seed] for seed in scores[True]]
    assert after.evidence.confirmed.gain == pytest.approx(np.mean(differences))
    half = t.ppf(0.975, 2) * np.std(differences, ddof=1) / np.sqrt(3)
    assert after.evidence.confirmed.interval[1] == pytest.approx(np.mean(differences) + half)


def test_one_seed_alone_confirms_nothing():
    study = searched()
    recommend(study, verify=1)
    study.optimize(verifiable(), n_trials=2)
    assert recommend(study).evidence.confirmed is None


def test_where_verification_shows_a_loss_uniform_is_recommended():
    study = searched()
    assert recommend(study, verify=3).ranks != SPACE.uniform()
    study.optimize(verifiable(gain=-1.0), n_trials=12)
    found = recommend(study)
    assert found.ranks == SPACE.uniform()
    assert "after 15 trials and 3 configurations verified on fresh seeds" in found.evidence.statement


def test_of_several_verified_configurations_the_one_that_did_well_is_preferred():
    study = searched(12, verifiable(search_noise=4))
    recommend(study, verify=4)
    known = {tuple(configured(trial).values()) for trial in verifying(study)}
    study.optimize(verifiable(gain=3.0), n_trials=15)
    chosen = tuple(recommend(study).ranks.values())
    true = {ranks: score(dict(zip(SPACE.layers, ranks, strict=True))) for ranks in known}
    assert chosen in known
    assert true[chosen] >= np.median(list(true.values()))


def test_a_configuration_that_broke_a_constraint_when_verified_is_not_recommended():
    def objective(trial):
        is_uniform = SPACE.suggest(trial) == SPACE.uniform()
        constrain(trial, -1.0 if is_uniform or verification_seed(trial) is None else 1.0)
        return verifiable()(trial)

    study = searched(objective=objective)
    before = recommend(study, verify=1)
    study.optimize(objective, n_trials=6)
    assert recommend(study).params != before.params


def test_the_search_after_verification_is_as_without_it():
    plain, verified = searched(), searched()
    recommend(verified, verify=2, seeds=2)
    verified.optimize(verifiable(), n_trials=6)
    assert recommend(verified).evidence.n_trials == recommend(plain).evidence.n_trials
    verified.optimize(verifiable(), n_trials=2)
    tried = [tuple(trial.params.values()) for trial in verified.trials if verification_seed(trial) is None]
    assert len(set(tried)) == len(tried) == 17
    assert [trial.number for trial in StudyReading(verified).uniform_trials] == [0]
    assert max(trial.value for trial in StudyReading(verified).finished_trials) < OFFSET


def test_anyones_study_can_be_verified_with_its_other_parameters():
    study = any_study()
    found = recommend(study, prior=None, verify=2, seeds=2)
    waiting = verifying(study, TrialState.WAITING)
    assert configured(waiting[0]) == found.params
    uniform = configured(waiting[1])
    assert {uniform[f"r_{i}"] for i in range(6)} == {8}
    assert (uniform["rate"], uniform["kind"]) == (found.params["rate"], found.params["kind"])

    def objective(trial):
        ranks = {i: trial.suggest_int(f"r_{i}", 2, 16, step=2) for i in range(6)}
        trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        trial.suggest_categorical("kind", ["a", "b"])
        return float(score(ranks) + OFFSET * (verification_seed(trial) % 10))

    study.optimize(objective, n_trials=len(waiting))
    assert all(configured(a) == b.params for a, b in zip(waiting, verifying(study), strict=True))
    after = recommend(study, prior=None)
    assert after.evidence.confirmed.n_verified == 2
    assert after.evidence.confirmed.gain == pytest.approx(score(after.ranks) - score(dict.fromkeys(range(6), 8)))


@pytest.mark.parametrize(("settings", "seen"), [({"verify": -1}, "-1 and 3"), ({"verify": 2, "seeds": 1}, "2 and 1")])
def test_a_verification_that_cannot_be_is_refused(settings, seen):
    with pytest.raises(ValueError, match=f"verify must be at least 0 and seeds at least 2, got {seen}"):
        recommend(searched(2), **settings)


@pytest.mark.parametrize("outcome", ["raises", "infinite"])
def test_a_configuration_that_failed_when_verified_is_not_recommended(outcome):
    def failing(trial):
        ranks = SPACE.suggest(trial)
        if verification_seed(trial) is None or ranks == SPACE.uniform():
            return float(score(ranks))
        if outcome == "raises":
            raise RuntimeError("diverged")
        return -np.inf

    study = searched(objective=failing)
    first = recommend(study, verify=1, seeds=2)
    study.optimize(failing, n_trials=4, catch=RuntimeError)
    found = recommend(study, verify=1, seeds=2)
    assert found.ranks != first.ranks
    assert "1 verified configuration failed on fresh seeds and cannot be recommended" in found.evidence.statement
    assert first.params not in [configured(t) for t in verifying(study, TrialState.WAITING)]


def test_verification_trials_have_the_same_parameters_but_for_ranks():
    """Also those that are not searched with the ranks, else their gain would be one of other parameters."""
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    study.optimize(conditional, n_trials=20)
    recommend(study, verify=1, seeds=2)
    study.optimize(conditional, n_trials=4)
    others = [{n: v for n, v in t.params.items() if not n.startswith("r_")} for t in verifying(study)]
    assert len(others) == 4
    assert all(each == others[0] for each in others)
