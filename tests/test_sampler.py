"""What RankAdaptorSampler adds to Optuna's contract; tests/test_conformance.py has the contract itself."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, RankSpace

SPACE = RankSpace(8, budget="uniform:8", costs=[100, 110, 120, 130, 120, 110, 100, 90])


def score(ranks):
    """Deeper layers need rank more; something to learn."""
    return sum((1 + layer) * np.log2(1 + rank) for layer, rank in ranks.items())


def objective(trial):
    return float(score(SPACE.suggest(trial)))


def new_study(space=SPACE, *, direction="maximize", seed=0, prior=None, **settings):
    sampler = RankAdaptorSampler(space, prior=prior, seed=seed)
    return optuna.create_study(sampler=sampler, direction=direction, **settings)


def ranks_of(trial, space=SPACE):
    return {layer: trial.params[space.name(layer)] for layer in space.layers}


def is_uniform(trial, space=SPACE):
    return ranks_of(trial, space) == space.uniform()


def random_space(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    candidates = [(0, 4, 8), (2, 4, 6, 8, 10, 12), (0, 1, 2, 4, 16), (8,), (3, 5, 32)][seed % 5]
    layers = sorted(rng.choice(n, int(rng.integers(1, n + 1)), replace=False).tolist())
    fixed = [i for i in range(n) if i not in layers]
    costs = rng.integers(1, 9999, len(layers)) if seed % 3 else rng.random(len(layers)) + 0.01
    low, high = candidates[0] * sum(costs), candidates[-1] * sum(costs)
    fixed_cost = float(rng.integers(9999)) if fixed else 0.0
    budget = fixed_cost + low + (high - low) * rng.random() ** 2
    return RankSpace(
        n,
        candidates,
        budget if budget > 0 else None,
        layers=layers,
        costs=costs,
        fixed_ranks=dict.fromkeys(fixed, 8),
        fixed_cost=fixed_cost,
        profile=rng.random(len(layers)),
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_budget_holds_for_every_proposal(seed):
    space = random_space(seed)
    study = new_study(space, seed=seed)
    rng = np.random.default_rng(seed)
    study.optimize(lambda trial: float(score(space.suggest(trial)) + rng.standard_normal()), n_trials=8)
    assert all(space.is_feasible(ranks_of(t, space)) for t in study.trials)
    assert not any(t.constraints for t in study.trials)


@pytest.mark.parametrize("cost", [0.1, 0.3, 1 / 3, 1.1])
def test_a_budget_in_fractions_is_not_exceeded_by_a_rounding_error(cost):
    space = RankSpace(9, budget="uniform:8", costs=[cost] * 9, fixed_cost=0.7)
    study = new_study(space)
    study.optimize(lambda trial: float(score(space.suggest(trial))), n_trials=12)
    assert [t.constraints for t in study.trials] == [{}] * 12


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_first_trial_is_uniform_and_no_other_is(direction):
    study = new_study(direction=direction)
    study.optimize(objective, n_trials=6)
    assert [is_uniform(t) for t in study.trials] == [True] + [False] * 5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_of_workers_that_ask_at_once_exactly_one_gets_the_uniform_configuration(order):
    study = new_study()
    trials = [study.ask() for _ in range(4)]
    for i in order:
        SPACE.suggest(trials[i])
    assert [is_uniform(t) for t in study.trials] == [True, False, False, False]


def test_a_worker_halfway_through_its_uniform_configuration_counts_as_the_one():
    study = new_study()
    first = study.ask()
    first.suggest_int("layer_00_rank", 2, 12, step=2)
    SPACE.suggest(study.ask())
    SPACE.suggest(first)
    assert [is_uniform(t) for t in study.trials] == [True, False]


def test_the_uniform_configuration_comes_second_where_others_were_enqueued():
    study = new_study()
    study.enqueue_trial({SPACE.name(layer): 2 for layer in SPACE.layers})
    study.optimize(objective, n_trials=3)
    assert [is_uniform(t) for t in study.trials] == [False, True, False]


def test_an_enqueued_uniform_trial_is_the_reference():
    study = new_study()
    study.enqueue_trial({SPACE.name(layer): rank for layer, rank in SPACE.uniform().items()})
    study.optimize(objective, n_trials=3)
    assert [is_uniform(t) for t in study.trials] == [True, False, False]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_finds_better_than_uniform_at_the_same_budget(direction):
    sign = 1 if direction == "maximize" else -1
    study = new_study(direction=direction)
    study.optimize(lambda trial: sign * objective(trial), n_trials=20)
    scores = [sign * t.value for t in study.trials]
    assert max(scores) > scores[0] + 1
    assert np.mean(scores[10:]) > scores[0]


def test_minimise_mirrors_maximise():
    up, down = new_study(), new_study(direction="minimize")
    up.optimize(objective, n_trials=6)
    down.optimize(lambda trial: -objective(trial), n_trials=6)
    assert [t.params for t in up.trials] == [t.params for t in down.trials]


WORKER = """
import sys
import optuna
from rankadaptor_optuna import RankAdaptorSampler, RankSpace
optuna.logging.set_verbosity(optuna.logging.ERROR)
sampler = RankAdaptorSampler(prior=None, seed=3)
study = optuna.load_study(study_name="s", storage=sys.argv[1], sampler=sampler)
space = RankSpace.from_dict(study.user_attrs["rankadaptor:space"])
sampler = RankAdaptorSampler(space, prior=None, seed=3)
study = optuna.load_study(study_name="s", storage=sys.argv[1], sampler=sampler)
space.suggest(study.ask())
"""


def test_a_resumed_study_proposes_what_an_unbroken_one_does_in_any_process(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    unbroken = new_study(seed=3)
    unbroken.optimize(objective, n_trials=9)
    stopped = new_study(seed=3, storage=url, study_name="s")
    stopped.optimize(objective, n_trials=4)
    resumed = new_study(seed=3, storage=url, study_name="s", load_if_exists=True)
    resumed.optimize(objective, n_trials=4)
    subprocess.run([sys.executable, "-c", WORKER, url], check=True)  # the ninth
    assert [t.params for t in resumed.trials] == [t.params for t in unbroken.trials]


def test_another_seed_makes_other_proposals_after_the_uniform_one():
    studies = [new_study(seed=seed) for seed in (0, 1)]
    for study in studies:
        study.optimize(objective, n_trials=4)
    assert studies[0].trials[0].params == studies[1].trials[0].params
    assert all(studies[0].trials[i].params != studies[1].trials[i].params for i in (1, 2, 3))


def test_without_a_seed_two_samplers_differ():
    studies = [new_study(seed=None) for _ in range(2)]
    for study in studies:
        study.optimize(objective, n_trials=3)
    assert studies[0].trials[2].params != studies[1].trials[2].params


def test_a_pickled_sampler_proposes_the_same():
    study = new_study()
    study.optimize(objective, n_trials=3)
    again = optuna.load_study(
        study_name=study.study_name, storage=study._storage, sampler=pickle.loads(pickle.dumps(study.sampler))
    )
    proposed = SPACE.suggest(again.ask())
    unbroken = new_study()
    unbroken.optimize(objective, n_trials=4)
    assert proposed == ranks_of(unbroken.trials[3])


def test_the_space_is_stored_with_the_study():
    study = new_study()
    study.ask()
    assert RankSpace.from_dict(study.user_attrs["rankadaptor:space"]) == SPACE


def anyones(name):
    """An objective of somebody who never heard of this package, with names in a style of his own."""

    def run(trial):
        ranks = {i: trial.suggest_int(name.format(i), 2, 16, step=2) for i in range(10)}
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
        batch = trial.suggest_int("batch_size", 1, 64)
        schedule = trial.suggest_categorical("schedule", ["cosine", "linear", None])
        off = abs(np.log10(rate) + 3) + abs(batch - 32) / 32 + (schedule != "linear")
        return float(score(ranks) - 20 * off)

    return run


@pytest.mark.parametrize("name", ["layer_{}_rank", "r_l{}"])
def test_it_goes_on_where_anothers_study_stopped(name):
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=0))
    study.optimize(anyones(name), n_trials=15)
    before = [t.value for t in study.trials]
    study.sampler = RankAdaptorSampler(prior=None, seed=0)
    study.optimize(anyones(name), n_trials=15)
    after = [t.value for t in study.trials[15:]]
    assert np.mean(after) > np.mean(before[-10:]) + 10
    assert max(after) > max(before)


def test_values_of_a_study_with_changed_ranges_are_learned_from():
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    for high in (8, 12):
        study.optimize(
            lambda trial, high=high: float(score({i: trial.suggest_int(f"r_{i}", 2, high) for i in range(4)})),
            n_trials=6,
        )
    assert all(t.state is TrialState.COMPLETE for t in study.trials)
    assert max(v for t in study.trials[6:] for v in t.params.values()) > 8


def test_partly_enqueued_ranks_are_kept_and_the_others_make_room_for_them():
    study = new_study()
    study.optimize(objective, n_trials=3)
    given = [{"layer_00_rank": 12, "layer_03_rank": 12, "layer_04_rank": 12}, {"layer_07_rank": 2}]
    for ranks in given:
        study.enqueue_trial(ranks)
    study.optimize(objective, n_trials=2)
    for trial, ranks in zip(study.trials[3:], given, strict=True):
        assert ranks.items() <= trial.params.items()
        assert SPACE.is_feasible(ranks_of(trial))


def test_a_partly_enqueued_first_trial_keeps_its_ranks_and_the_budget():
    study = new_study()
    study.enqueue_trial({"layer_05_rank": 12})
    study.optimize(objective, n_trials=2)
    assert study.trials[0].params["layer_05_rank"] == 12
    assert SPACE.is_feasible(ranks_of(study.trials[0]))
    assert is_uniform(study.trials[1])


def test_enqueued_ranks_that_no_budget_can_save_get_the_cheapest_rest():
    study = new_study()
    study.enqueue_trial({SPACE.name(layer): 12 for layer in range(6)})
    study.optimize(objective, n_trials=1)
    assert [*ranks_of(study.trials[0]).values()] == [12] * 6 + [2] * 2
    assert study.trials[0].constraints["budget"] > 0


def test_a_fully_enqueued_trial_is_run_as_it_is():
    study = new_study()
    study.optimize(objective, n_trials=2)
    given = {SPACE.name(layer): 12 for layer in SPACE.layers}
    study.enqueue_trial(given)
    study.optimize(objective, n_trials=2)
    assert study.trials[2].params == given
    assert SPACE.is_feasible(ranks_of(study.trials[3]))


@pytest.mark.parametrize("finished", [0, 5])
def test_eight_workers_at_once_get_eight_configurations(finished):
    study = new_study()
    study.optimize(objective, n_trials=finished)
    trials = [study.ask() for _ in range(8)]
    for trial in trials:
        SPACE.suggest(trial)
    assert len({tuple(t.params.values()) for t in study.trials}) == finished + 8


def test_a_small_space_is_gone_through_without_repeats():
    space = RankSpace(3, (2, 4))
    study = new_study(space)
    for _ in range(8):  # nobody finishes
        space.suggest(study.ask())
    assert len({tuple(t.params.values()) for t in study.trials}) == 8
    space.suggest(study.ask())  # and one more is no error


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


def test_two_objectives_spread_over_the_front_within_the_budget():
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=RankAdaptorSampler(SPACE, prior=None, seed=0)
    )

    def both(trial):
        ranks = SPACE.suggest(trial)
        return float(score(ranks)), SPACE.cost(ranks)

    study.optimize(both, n_trials=20)
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)
    costs = [t.values[1] for t in study.best_trials]
    assert len(costs) >= 3
    assert min(costs) < 0.8 * SPACE.budget


@pytest.mark.parametrize("fixed", [2, 12])
def test_with_parameters_fixed_by_optuna_the_budget_still_holds(fixed):
    study = new_study()
    study.optimize(objective, n_trials=3)
    study.sampler = PartialFixedSampler({"layer_00_rank": fixed, "layer_05_rank": fixed}, study.sampler)
    study.optimize(objective, n_trials=8)
    for trial in study.trials[3:]:
        assert (trial.params["layer_00_rank"], trial.params["layer_05_rank"]) == (fixed, fixed)
        assert SPACE.is_feasible(ranks_of(trial))


def test_two_threads_share_a_study():
    study = new_study()
    study.optimize(objective, n_trials=10, n_jobs=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 10
    assert sum(is_uniform(t) for t in study.trials) == 1
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)


def test_other_parameters_are_searched_beside_the_spaces_ranks():
    def run(trial):
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        return objective(trial) - 20 * abs(np.log10(rate) + 3)

    study = new_study()
    study.optimize(run, n_trials=25)
    off = [abs(np.log10(t.params["rate"]) + 3) for t in study.trials]
    assert np.mean(off[15:]) < 0.5 < np.mean(off[:5])
    assert is_uniform(study.trials[0])
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)


def test_the_independent_sampler_samples_what_is_outside_the_relative_space():
    sampler = RankAdaptorSampler(prior=None, seed=0, independent_sampler=RandomSampler(seed=5))
    study = optuna.create_study(sampler=sampler)
    value = study.ask().suggest_float("x", 0, 1)
    assert value == optuna.create_study(sampler=RandomSampler(seed=5)).ask().suggest_float("x", 0, 1)


def test_the_shipped_prior_is_used_unless_switched_off():
    def second(prior):
        study = new_study(prior=prior)
        study.optimize(objective, n_trials=5)
        return [t.params for t in study.trials]

    assert second("pretrained") != second(None)


def test_a_negative_number_of_startup_trials_is_refused():
    with pytest.raises(ValueError, match="n_startup_trials must be at least 0, got -1"):
        RankAdaptorSampler(n_startup_trials=-1)


def test_a_prior_that_cannot_be_read_is_refused_at_once():
    with pytest.raises(ValueError, match="cannot read the prior 'nowhere'"):
        RankAdaptorSampler(prior="nowhere")
