from __future__ import annotations

import re
import warnings
from functools import partial

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study, recommend
from rankadaptor_optuna.studies.reading import StudyReading
from tests.studies.common import (
    SPACE,
    any_study,
    configured,
    constrain,
    own_gain,
    score,
    verifying,
)


def run(n_trials, *, noise=0.0, signal=1.0, seed=0, direction="maximize", space=SPACE):
    rng = np.random.default_rng(seed)
    sign = 1 if direction == "maximize" else -1
    study = optuna.create_study(sampler=RankAdaptorSampler(space, prior=None, seed=seed), direction=direction)
    study.optimize(
        lambda trial: float(sign * (signal * score(space.suggest(trial)) + noise * rng.standard_normal())),
        n_trials=n_trials,
    )
    return study


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (lambda: create_study(space=SPACE), "has no trials yet; run some first"),
        (
            lambda: optuna.create_study(directions=["minimize"] * 2),
            r"one objective, this study has 2; see .*best_trials",
        ),
        (lambda: of_trials(lambda trial: trial.suggest_float("x", 0, 1)), "no rank parameters; its trials have: x, "),
        (lambda: of_trials(failing), r"finite score yet: 3 failed\."),
        (lambda: of_trials(pruned), r"finite score yet: 3 pruned\."),
    ],
)
def test_recommend_says_what_is_missing(study, message):
    with pytest.raises(ValueError, match=message):
        recommend(study())


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_a_recovery_that_is_worse_than_none_is_said(direction, sign):
    study = run(5, direction=direction)
    predicted = recommend(study).predicted
    for unrecovered, worse in ((predicted + sign, True), (predicted - sign, False), ("high", False)):
        study.set_user_attr("rankadaptor:unrecovered", unrecovered)
        statement = recommend(study).evidence.statement
        assert ("But recovery made the model worse: predicted score" in statement) is worse
    study.set_user_attr("rankadaptor:unrecovered", predicted + sign)
    assert f"without recovery {predicted + sign:.4f}. Lower the learning rate" in recommend(study).evidence.statement


def of_trials(objective):
    study = optuna.create_study(sampler=RandomSampler())
    study.optimize(objective, n_trials=3, catch=RuntimeError)
    return study


def failing(trial):
    SPACE.suggest(trial)
    raise RuntimeError


def pruned(trial):
    SPACE.suggest(trial)
    raise optuna.TrialPruned


def test_a_space_with_other_names_than_the_trials_is_refused_and_a_template_names_them():
    def objective(trial):
        return float(sum(trial.suggest_int(f"layer_{i}_rank", 2, 12, step=2) for i in range(12)))

    study = of_trials(objective)
    with pytest.raises(ValueError, match=r"all ranks \(layer_00_rank, .*its trials have layer_0_rank, .*name="):
        recommend(study, space=RankSpace(12, budget="uniform:6"))
    space = RankSpace(12, budget="uniform:6", name="layer_{}_rank")
    assert space.is_feasible(recommend(study, space=space).ranks)


def test_declared_ranks_are_kept_by_the_study():
    def objective(trial):
        return float(sum(trial.suggest_int(f"n{i}", 2, 12, step=2) for i in range(2)))

    study = optuna.create_study(sampler=RankAdaptorSampler(ranks="n{}", prior=None, seed=0))
    study.optimize(objective, n_trials=6)
    study.sampler = RandomSampler()
    assert set(recommend(study, prior=None).ranks) == {0, 1}
    assert recommend(of_trials(objective), ranks="n{}", prior=None).ranks.keys() == {0, 1}


def test_unequal_costs_of_a_drop_in_study_are_said():
    def objective(trial, sign):
        return sign * float(sum(trial.suggest_int(f"r{i}", 2, 12, step=2) for i in range(6)))

    for sign, cost in ((1, "2 times"), (-1, "0.33 times")):
        study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
        study.optimize(lambda trial, sign=sign: objective(trial, sign), n_trials=20)
        assert f"add up to {cost} as much" in recommend(study, prior=None).evidence.statement


def test_the_parameters_of_a_recommendation_run_as_a_trial():
    def objective(trial):
        if trial.suggest_categorical("method", ["lora", "full"]) == "full":
            return 100 + trial.suggest_float("rate", 0, 1)
        trial.suggest_int("steps", 7, 7)
        targets = trial.suggest_categorical("targets", [["q"], ["q", "v"]])
        return float(sum(trial.suggest_int(f"r{i}", 2, 12, step=2) for i in range(6)) + len(targets))

    study = optuna.create_study(sampler=RandomSampler(seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lists as categories
        study.optimize(objective, n_trials=20)
        found = recommend(study, prior=None, verify=1)
        assert objective(optuna.trial.FixedTrial(found.params)) < 30
    assert (found.params["method"], found.params["steps"]) == ("lora", 7)


def test_gains_are_surer_where_each_trial_has_noise_of_its_own():
    rng = np.random.default_rng(0)

    def objective(trial):
        ranks = {i: trial.suggest_int(f"r{i}", 2, 12, step=2) for i in range(6)}
        return float(score(ranks) + rng.normal())

    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=40)

    def width(**given):
        return np.ptp(recommend(study, prior=None, **given).evidence.interval)

    assert width(independent_noise=True) < 0.8 * width() == 0.8 * width(independent_noise=False)
    study.enqueue_trial(study.best_params)
    study.optimize(objective, n_trials=1)  # equal parameters, another score
    assert width() == width(independent_noise=True)


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
    names = [f"{m}_{i}_r" for i in range(3) for m in ("a", "b")]
    study.optimize(lambda trial: float(sum(trial.suggest_int(n, 1, 8) for n in names)), n_trials=5)
    found = recommend(study, prior=None)
    assert found.params.keys() == set(names)
    assert found.ranks == {}
    with pytest.raises(ValueError, match="do not say which modules"):
        _ = found.rank_pattern
    assert found.cost == sum(found.params.values())


def test_several_ranks_of_a_layer_are_those_of_the_modules_in_their_names():
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    names = [f"layer_{i}_{m}_rank" for i in range(3) for m in ("q", "v")]
    study.optimize(lambda trial: float(sum(trial.suggest_int(n, 1, 8) for n in names)), n_trials=5)
    found = recommend(study, prior=None)
    assert found.ranks["1.v_proj"] == found.params["layer_1_v_rank"]
    pattern = next(
        key for key in found.rank_pattern if re.fullmatch(rf"(.*\.)?({key})", "model.layers.1.self_attn.v_proj")
    )
    assert found.rank_pattern[pattern] == found.params["layer_1_v_rank"]


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
