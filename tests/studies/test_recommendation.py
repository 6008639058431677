from __future__ import annotations

import re
from functools import partial

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from scipy.stats import t

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study, recommend, verification_seed
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading

SPACE = RankSpace(
    10, budget="uniform:8", layers=range(1, 9), costs=[100] * 4 + [120] * 4, fixed_ranks={0: 8, 9: 8}, fixed_cost=1600
)


def score(ranks):
    """Deeper layers need rank more."""
    return sum(layer * np.log2(1 + rank) for layer, rank in ranks.items())


def run(n_trials, *, noise=0.0, signal=1.0, seed=0, direction="maximize", space=SPACE):
    rng = np.random.default_rng(seed)
    sign = 1 if direction == "maximize" else -1
    study = optuna.create_study(sampler=RankAdaptorSampler(space, prior=None, seed=seed), direction=direction)
    study.optimize(
        lambda trial: float(sign * (signal * score(space.suggest(trial)) + noise * rng.standard_normal())),
        n_trials=n_trials,
    )
    return study


def own_gain(study, ranks):
    """What the search predicts on its own seed: mean and standard deviation."""
    return (float(x[0]) for x in FittedStudy(StudyReading(study, SPACE)).model.predict_gain([*ranks.values()]))


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (lambda: create_study(space=SPACE), "has no finished trial yet; run some first"),
        (
            lambda: optuna.create_study(directions=["minimize"] * 2),
            r"one objective, this study has 2; see .*best_trials",
        ),
        (lambda: optuna.create_study(sampler=RandomSampler()), "no rank parameters: names with a layer number"),
    ],
)
def test_recommend_says_what_is_missing(study, message):
    with pytest.raises(ValueError, match=message):
        recommend(study())


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_recommendation_is_within_the_budget_and_better_than_uniform(direction):
    study = run(20, direction=direction)
    found = recommend(study)
    assert SPACE.is_feasible(found.ranks)
    assert found.cost == SPACE.cost(found.ranks)
    assert score(found.ranks) > score(SPACE.uniform()) + 1
    assert found.evidence.gain > 0
    assert found.predicted == pytest.approx((1 if direction == "maximize" else -1) * score(found.ranks), rel=0.05)
    assert found.std > 0


def test_the_recommendation_is_ready_for_peft():
    found = recommend(run(6))
    assert found.params == {SPACE.name(layer): rank for layer, rank in found.ranks.items()}
    assert found.all_ranks == {0: 8, **found.ranks, 9: 8}
    assert [*found.all_ranks] == [*range(10)]
    assert found.rank_pattern == {rf"layers\.{i}\..*": r for i, r in found.all_ranks.items()}
    assert found.alpha_pattern == {rf"layers\.{i}\..*": 2 * r for i, r in found.all_ranks.items()}


def test_a_recommendation_by_sublayer_is_ready_for_peft_too(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    space = RankSpace(
        4, (0, 4, 8), "uniform:4", layers=[1, 2], costs=[10, 25, 10, 20], fixed_ranks={0: 8}, granularity="sublayer"
    )
    study = create_study(storage=url, study_name="s", space=space)
    study.optimize(lambda trial: float(np.log1p([*space.suggest(trial).values()]) @ [1, 9, 1, 1]), n_trials=12)
    found = recommend(optuna.load_study(study_name="s", storage=url))
    assert found.ranks.keys() == set(space.modules)
    assert found.ranks["1.mlp"] == 8
    assert space.is_feasible(found.ranks)
    assert found.cost == space.cost(found.ranks)
    assert found.params == {space.name(module): rank for module, rank in found.ranks.items()}
    assert found.all_ranks == {"0.self_attn": 8, "0.mlp": 8, **found.ranks}
    expected = {r"layers\." + m.replace(".", r"\.") + r"\..*": r for m, r in found.all_ranks.items() if r}
    assert found.rank_pattern == expected
    assert found.alpha_pattern == {pattern: 2 * rank for pattern, rank in expected.items()}
    assert [t.number for t in StudyReading(study).uniform_trials] == [0]


def test_the_evidence_says_what_the_recommendation_rests_on():
    study = run(20)
    found = recommend(study)
    evidence = found.evidence
    assert evidence.n_trials == 20
    low, high = evidence.interval
    assert low < evidence.gain < high
    assert low + high == pytest.approx(2 * evidence.gain)
    assert len(evidence.closest) == 3
    for number, differing, value in evidence.closest:
        trial = study.trials[number]
        assert value == trial.value
        assert differing == sum(trial.params[name] != rank for name, rank in found.params.items())
    assert [d for _, d, _ in evidence.closest] == sorted(d for _, d, _ in evidence.closest)


def test_a_clear_signal_is_said_to_be_supported_but_on_one_seed():
    evidence = recommend(run(25)).evidence
    assert evidence.interval[0] < 0
    supported = "Supported on the search's own seed only: predicted gain over uniform rank 8 on fresh seeds +"
    assert evidence.statement.startswith(supported)
    assert re.search(r" \(95% interval -[\d.]+ to \+[\d.]+\), from 25 trials\.$", evidence.statement)


def test_a_signal_so_large_that_other_seeds_will_have_it_is_said_to_be_supported():
    space = RankSpace(8, (2, 4, 8, 16, 32), "uniform:8")
    study = optuna.create_study(sampler=RankAdaptorSampler(space, prior=None, seed=0), direction="maximize")
    study.optimize(lambda t: float(np.linspace(-3, 3, 8) @ np.log2([*space.suggest(t).values()])), n_trials=25)
    evidence = recommend(study).evidence
    assert evidence.interval[0] > 0
    assert evidence.statement.startswith("Supported by the data: predicted gain over uniform rank 8 on fresh seeds +")


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_is_said_to_support_nothing(seed):
    statement = recommend(run(20, signal=0, noise=1, seed=seed)).evidence.statement
    assert statement.startswith(("Not yet supported by the data", "Keep uniform rank 8"))


@pytest.mark.parametrize("signal", [0, 0.1, 1])
def test_a_gain_is_recommended_only_where_it_exceeds_half_its_standard_deviation(signal):
    for seed in range(3):
        study = run(10, signal=signal, noise=1, seed=seed)
        ranks = recommend(study).ranks
        gain, std = own_gain(study, ranks)
        assert ranks == SPACE.uniform() or gain > 0.5 * std


def test_verifying_tries_others_also_where_uniform_is_recommended():
    studies = [run(10, signal=0, noise=1, seed=seed) for seed in range(4)]
    safe = next(study for study in studies if recommend(study).ranks == SPACE.uniform())
    recommend(safe, verify=2, seeds=2)
    waiting = {tuple(configured(t).values()) for t in verifying(safe, TrialState.WAITING)}
    assert len(waiting) == 3
    assert tuple(SPACE.uniform().values()) in waiting


def test_the_uniform_configuration_may_be_the_answer():
    space = RankSpace(4, (8,), "uniform:8")
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(space, prior=None))
    study.optimize(lambda trial: float(score(space.suggest(trial))), n_trials=2)
    found = recommend(study)
    assert found.ranks == space.uniform()
    assert found.evidence.statement == "Keep uniform rank 8: after 2 trials, no other configuration is safely better."


def test_under_noise_the_model_is_followed_and_not_the_luckiest_trial():
    chosen, luckiest = [], []
    for seed in range(4):
        study = run(30, noise=8, seed=seed)
        chosen.append(score(recommend(study).ranks))
        luckiest.append(score({layer: study.best_params[SPACE.name(layer)] for layer in SPACE.layers}))
    assert np.mean(chosen) > np.mean(luckiest) + 1


def test_one_lucky_trial_is_not_recommended():
    study = run(20)
    lucky = study.best_value + 1
    ranks = {SPACE.name(layer): 12 if layer < 5 else 2 for layer in SPACE.layers}  # the worst there is
    study.enqueue_trial(ranks)
    study.optimize(lambda trial: lucky + 0 * SPACE.suggest(trial)[1], n_trials=1)
    assert study.best_trial.number == 20
    found = recommend(study)
    assert found.params != ranks
    assert found.evidence.statement.startswith("Not yet supported by the data")


def any_study(name="r_{}", n_trials=15, n_layers=6, sampler=None):
    """Somebody's own study: a sampler that knows nothing of ranks, and other parameters beside them."""

    def objective(trial):
        ranks = {i: trial.suggest_int(name.format(i), 2, 16, step=2) for i in range(n_layers)}
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        kind = trial.suggest_categorical("kind", ["a", "b"])
        return float(score(ranks) - 10 * abs(np.log10(rate) + 3) - 10 * (kind == "a"))

    study = optuna.create_study(direction="maximize", sampler=sampler or TPESampler(seed=0))
    study.optimize(objective, n_trials=n_trials)
    return study


def test_any_study_with_ranks_gets_a_recommendation():
    found = recommend(any_study(), prior=None)
    assert found.ranks.keys() == set(range(6))
    assert found.cost == sum(found.ranks.values())
    assert found.params.keys() == {*(f"r_{i}" for i in range(6)), "rate", "kind"}
    assert 1e-4 < found.params["rate"] < 1e-2
    assert found.params["kind"] == "b"
    assert "the middle of each rank's range" in found.evidence.statement or "uniform rank 8" in found.evidence.statement


def test_a_space_given_later_puts_a_budget_on_any_study():
    space = RankSpace(6, (2, 4, 8, 16), "uniform:4")
    found = recommend(any_study("layer_{:02d}_rank", sampler=RandomSampler(seed=0)), space=space, prior=None)
    assert space.is_feasible(found.ranks)
    assert found.cost == space.cost(found.ranks)


def test_trials_without_all_of_a_given_spaces_ranks_are_left_out():
    space = RankSpace(4)
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    study.optimize(lambda trial: float(score(space.suggest(trial))), n_trials=5)
    study.optimize(lambda trial: float(sum(trial.suggest_int(f"layer_0{i}_rank", 2, 12) for i in range(3))), n_trials=1)
    assert recommend(study, space=space, prior=None).evidence.n_trials == 5


def test_where_several_ranks_belong_to_a_layer_the_parameters_say_which():
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    names = [f"{m}_{i}_r" for i in range(3) for m in ("q", "v")]
    study.optimize(lambda trial: float(sum(trial.suggest_int(n, 1, 8) for n in names)), n_trials=5)
    found = recommend(study, prior=None)
    assert found.params.keys() == set(names)
    assert found.ranks == found.rank_pattern == {}
    assert found.cost == sum(found.params.values())


HAS_SET_CONSTRAINT = hasattr(optuna.trial.Trial, "set_constraint")  # not before Optuna 5


def constrain(trial, value):
    if HAS_SET_CONSTRAINT:
        trial.set_constraint("c", value)
    else:
        trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [value])


def test_the_recommendation_keeps_a_constraint_that_the_score_alone_would_break():
    def over(ranks):
        return sum(ranks[layer] for layer in (6, 7, 8)) - 24  # at most rank 8 there

    def objective(trial, limited):
        ranks = SPACE.suggest(trial)
        if limited:
            constrain(trial, float(over(ranks)))
        return float(score(ranks))

    found = []
    for limited in (False, True):
        study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(SPACE, prior=None, seed=0))
        study.optimize(partial(objective, limited=limited), n_trials=30)
        found.append(recommend(study).ranks)
    free, kept = found
    assert over(free) > 0
    assert over(kept) <= 0
    assert score(kept) > score(SPACE.uniform())


OFFSET = 1000.0  # between two seeds, far more than between two configurations


def verifiable(gain=1.0, noise=0.3, search_noise=0.0, direction="maximize"):
    """An objective that heeds the seed: an offset of its own, and allocations that matter ``gain`` times as much."""
    sign = 1 if direction == "maximize" else -1

    def objective(trial):
        ranks, seed = SPACE.suggest(trial), verification_seed(trial)
        rng = np.random.default_rng([seed or 0, *ranks.values()])
        if seed is None:
            return float(sign * (score(ranks) + search_noise * rng.standard_normal()))
        return float(sign * (gain * score(ranks) + OFFSET * (seed % 10) + noise * rng.standard_normal()))

    return objective


def searched(n_trials=15, objective=None, direction="maximize", **settings):
    study = optuna.create_study(direction=direction, sampler=RankAdaptorSampler(SPACE, prior=None, seed=0), **settings)
    study.optimize(objective or verifiable(direction=direction), n_trials=n_trials)
    return study


def verifying(study, state=None):
    trials = study.trials if state is None else study.get_trials(states=(state,))
    return [t for t in trials if verification_seed(t) is not None]


def configured(trial):
    return trial.params or trial.system_attrs["fixed_params"]


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
