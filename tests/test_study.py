from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study, recommend
from rankadaptor_optuna.study import RECIPE_ATTR, finished_trials, masked, open_storage, study_space, uniform_trials

SPACE = RankSpace(
    10, budget="uniform:8", layers=range(1, 9), costs=[100] * 4 + [120] * 4, fixed_ranks={0: 8, 9: 8}, fixed_cost=1600
)
RECIPE = {"model": "tiny", "pruning": {"ratio": 0.25}, "candidates": [2, 4, 8]}


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


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_a_study_is_resumed_by_its_name_with_its_trials(url):
    settings = {"storage": url, "study_name": "s", "space": SPACE, "recipe": RECIPE, "direction": "minimize"}
    create_study(**settings).optimize(lambda trial: -score(SPACE.suggest(trial)), n_trials=2)
    resumed = create_study(**settings)
    assert len(resumed.trials) == 2
    assert resumed.user_attrs[RECIPE_ATTR] == RECIPE
    assert resumed.sampler.space == SPACE
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        create_study(**settings, load_if_exists=False)


def test_by_default_a_study_is_in_memory_and_maximised():
    study = create_study(space=SPACE)
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.sampler.space == SPACE
    assert create_study(sampler=(own := RandomSampler())).sampler is own


def test_another_recipe_is_refused_and_the_differences_named(url):
    create_study(storage=url, study_name="s", recipe=RECIPE)
    other = {**RECIPE, "model": "big", "pruning": {"ratio": 0.5}, "seed": 1}
    with pytest.raises(ValueError, match="study 's' belongs to other settings") as caught:
        create_study(storage=url, study_name="s", recipe=other)
    message = str(caught.value)
    assert "model was tiny, now big" in message
    assert "pruning was {'ratio': 0.25}, now {'ratio': 0.5}" in message
    assert "seed was None, now 1" in message
    assert "candidates" not in message
    assert "another study name" in message
    assert optuna.load_study(study_name="s", storage=url).user_attrs[RECIPE_ATTR] == RECIPE


def test_a_recipe_is_the_same_again_after_json_made_lists_of_its_tuples(url):
    recipe = {"candidates": (2, 4, 8)}
    create_study(storage=url, study_name="s", recipe=recipe)
    assert create_study(storage=url, study_name="s", recipe=recipe).study_name == "s"


def test_a_database_of_an_url_gets_a_heartbeat_that_retries(url):
    storage = open_storage(url)
    assert storage.heartbeat_interval > 0
    assert create_study(storage=storage)._storage._backend is storage


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////no/such/folder/study.db",
        "postgresql+psycopg://me:s3cret@127.0.0.1:1/studies",
        "postgresql+nodriver://me:s3cret@127.0.0.1/studies",
        "nodatabase://me:s3cret@127.0.0.1/studies",
        "oracle://me:s3cret@127.0.0.1/studies",
        "postgresql://me:s3cret@127.0.0.1:port/studies",
        "study.db",
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(url):
    with pytest.raises(ValueError, match="cannot open the storage ") as caught:
        create_study(storage=url)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_masked_url_keeps_all_but_the_password():
    assert masked("postgresql+psycopg://me:s3cret@host:5432/db") == "postgresql+psycopg://me:***@host:5432/db"
    assert masked("sqlite:///study.db") == "sqlite:///study.db"
    assert masked("s3cret") == "(not a database URL)"


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


def test_failed_and_infinite_trials_are_no_finished_trials():
    study = create_study(space=SPACE)
    for value in ("nan", "inf", "-inf"):
        study.optimize(lambda trial, value=value: 0 * SPACE.suggest(trial)[1] + float(value), n_trials=1)
    assert finished_trials(study) == []
    with pytest.raises(ValueError, match="no finished trial"):
        recommend(study)


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


def test_a_recommendation_by_sublayer_is_ready_for_peft_too(url):
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
    assert [t.number for t in uniform_trials(study)] == [0]


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


def test_a_clear_signal_is_said_to_be_supported():
    statement = recommend(run(25)).evidence.statement
    assert statement.startswith("Supported by the data: predicted gain over rank 8 everywhere +")
    assert statement.endswith("from 25 trials.")


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_is_said_to_support_nothing(seed):
    statement = recommend(run(20, signal=0, noise=1, seed=seed)).evidence.statement
    assert "does not support" in statement or "itself is expected to be best" in statement


def test_the_uniform_configuration_may_be_the_answer():
    space = RankSpace(4, (8,), "uniform:8")
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(space, prior=None))
    study.optimize(lambda trial: float(score(space.suggest(trial))), n_trials=2)
    found = recommend(study)
    assert found.ranks == space.uniform()
    assert found.evidence.statement == "After 2 trials rank 8 everywhere itself is expected to be best."


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
    assert "does not support" in found.evidence.statement


def test_a_study_opened_elsewhere_knows_its_space(url):
    study = create_study(storage=url, study_name="s", space=SPACE)
    study.optimize(lambda trial: float(score(SPACE.suggest(trial))), n_trials=3)
    opened = optuna.load_study(study_name="s", storage=url)
    assert study_space(opened) == SPACE
    assert [t.number for t in uniform_trials(opened)] == [0]
    assert SPACE.is_feasible(recommend(opened).ranks)


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
    assert "the middle of each rank's range" in found.evidence.statement or "rank 9" in found.evidence.statement


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
