"""What RankAdaptorSampler adds to Optuna's contract; tests/test_conformance.py has the contract itself."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.pruners import HyperbandPruner
from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from rankadaptor_optuna import PerformanceModel, RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.attributes import SENSITIVITY_ATTR

SPACE = RankSpace(8, budget="uniform:8", costs=[100, 110, 120, 130, 120, 110, 100, 90])
RANK = SPACE.distributions()[SPACE.name(0)]
HAS_SET_CONSTRAINT = hasattr(optuna.trial.Trial, "set_constraint")  # not before Optuna 5


def score(ranks):
    """Deeper layers need rank more; something to learn."""
    return sum((1 + layer) * np.log2(1 + rank) for layer, rank in ranks.items())


def objective(trial):
    return float(score(SPACE.suggest(trial)))


def new_study(space=SPACE, *, direction="maximize", seed=0, prior=None, **settings):
    sampler = RankAdaptorSampler(space, prior=prior, seed=seed)
    return optuna.create_study(sampler=sampler, direction=direction, **settings)


def ranks_of(trial, space=SPACE):
    return {module: trial.params[space.name(module)] for module in space.modules}


def is_uniform(trial, space=SPACE):
    return ranks_of(trial, space) == space.uniform()


def constrain(trial, value):
    if HAS_SET_CONSTRAINT:
        trial.set_constraint("c", value)
    else:
        trial.storage.set_trial_system_attr(trial._trial_id, "constraints", [value])


def constraints_of(study):
    return [getattr(t, "constraints", {}) for t in study.trials]


def random_space(seed, granularity="layer"):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    candidates = [(0, 4, 8), (2, 4, 6, 8, 10, 12), (0, 1, 2, 4, 16), (8,), (3, 5, 32)][seed % 5]
    layers = sorted(rng.choice(n, int(rng.integers(1, n + 1)), replace=False).tolist())
    fixed = [i for i in range(n) if i not in layers]
    n_ranks = len(layers) * (1 if granularity == "layer" else 2)
    costs = rng.integers(1, 9999, n_ranks) if seed % 3 else rng.random(n_ranks) + 0.01
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
        profile=rng.random(n_ranks),
        granularity=granularity,
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_budget_holds_for_every_proposal(seed):
    space = random_space(seed)
    study = new_study(space, seed=seed)
    rng = np.random.default_rng(seed)
    study.optimize(lambda trial: float(score(space.suggest(trial)) + rng.standard_normal()), n_trials=8)
    assert all(space.is_feasible(ranks_of(t, space)) for t in study.trials)
    assert not any(constraints_of(study))


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_holds_for_every_proposal_by_sublayer_and_uniform_comes_first(seed):
    space = random_space(seed, "sublayer")
    study = new_study(space, seed=seed)
    rng = np.random.default_rng(seed)
    weights = dict(zip(space.modules, rng.random(len(space.modules)), strict=True))

    def noisy(trial):
        ranks = space.suggest(trial)
        return float(sum(weights[m] * np.log2(1 + r) for m, r in ranks.items()) + 0.1 * rng.standard_normal())

    study.optimize(noisy, n_trials=30)
    assert is_uniform(study.trials[0], space)
    assert all(space.is_feasible(ranks_of(t, space)) for t in study.trials)
    assert not any(constraints_of(study))


@pytest.mark.parametrize("candidates", [(2, 4, 6, 8, 10, 12), (0, 4, 8, 16, 32)])
def test_where_only_the_mlps_ranks_matter_the_budget_goes_there(candidates):
    space = RankSpace(10, candidates, "uniform:8", costs=[1, 2] * 10, granularity="sublayer")

    def gain(ranks):
        return float(sum((2 + i % 3) * np.log2(1 + ranks[m]) for i, m in enumerate(space.modules[1::2])))

    study = new_study(space)
    study.optimize(lambda trial: gain(space.suggest(trial)), n_trials=25)
    found = recommend(study).ranks
    attention, mlp = ([found[m] for m in space.modules[part]] for part in space.series.values())
    assert np.mean(attention) < candidates[0] + 2 < 8
    assert np.mean(mlp) > 10
    assert gain(found) > 1.08 * gain(space.uniform())


@pytest.mark.parametrize("cost", [0.1, 0.3, 1 / 3, 1.1])
def test_a_budget_in_fractions_is_not_exceeded_by_a_rounding_error(cost):
    space = RankSpace(9, budget="uniform:8", costs=[cost] * 9, fixed_cost=0.7)
    study = new_study(space)
    study.optimize(lambda trial: float(score(space.suggest(trial))), n_trials=12)
    assert constraints_of(study) == [{}] * 12


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


def test_of_several_draws_the_one_least_known_at_its_optimum_is_proposed(monkeypatch):
    known = new_study()
    known.optimize(objective, n_trials=8)
    model = PerformanceModel(SPACE, prior=None)
    model.update([list(ranks_of(t).values()) for t in known.trials], [t.value for t in known.trials])

    def uncertainty(n_draws):
        monkeypatch.setattr("rankadaptor_optuna.sampling.sampler._N_DRAWS", n_draws)
        found = []
        for seed in range(12):
            study = new_study(seed=seed)
            study.add_trials(known.trials)
            found.append(model.predict_gain(list(SPACE.suggest(study.ask()).values()))[1][0])
        return sum(found)

    assert uncertainty(8) > 1.05 * uncertainty(1)


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_copied_sampler_proposes_the_same(copied):
    study = new_study()
    study.optimize(objective, n_trials=3)
    again = optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=copied(study.sampler))
    proposed = SPACE.suggest(again.ask())
    unbroken = new_study()
    unbroken.optimize(objective, n_trials=4)
    assert proposed == ranks_of(unbroken.trials[3])


def test_a_pickled_sampler_carries_no_trials():
    study = new_study()
    before = pickle.dumps(study.sampler)
    study.optimize(objective, n_trials=3)
    assert pickle.dumps(study.sampler) == before


@pytest.mark.parametrize("storage", ["sqlite", "journal", "grpc"], indirect=True)
def test_every_storage_gives_the_same_proposals_as_memory(storage):
    def run(trial):
        off = abs(np.log10(trial.suggest_float("z_rate", 1e-5, 1e-1, log=True)) + 3)
        off += trial.suggest_categorical("kind", ["a", "b", None]) != "b"
        ranks = SPACE.suggest(trial)
        trial.report(-off, 0)
        if trial.number % 4 == 3:
            raise optuna.TrialPruned
        return float(score(ranks)) - 10 * off - trial.suggest_int("batch", 1, 64) / 64

    in_memory = new_study()
    in_memory.optimize(run, n_trials=10)
    stored = new_study(storage=storage)
    stored.optimize(run, n_trials=10)
    assert [t.params for t in stored.trials] == [t.params for t in in_memory.trials]


def test_the_order_in_which_trials_finish_does_not_matter():
    def run(trial):
        return anyones("r_{}")(trial) + trial.suggest_int("warmup", 0, 10 + trial.number)

    proposed = []
    for order in (range(6), (5, 2, 0, 3, 1, 4)):
        study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
        study.optimize(run, n_trials=3)
        trials = [study.ask() for _ in range(6)]
        values = [run(trial) for trial in trials]
        for i in order:
            study.tell(trials[i], values[i])
            study.sampler.infer_relative_search_space(study, study.trials[-1])  # it takes notice of each
        run(study.ask())
        proposed.append(study.trials[-1].params)
    assert proposed[0] == proposed[1]


def test_one_sampler_serves_two_studies_in_turn():
    other_space = RankSpace(8, (2, 16, 32))
    alone = [optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0)) for _ in "ab"]
    shared = RankAdaptorSampler(prior=None, seed=0)
    in_turn = [optuna.create_study(direction="maximize", sampler=shared) for _ in "ab"]
    for studies in (alone, in_turn):
        for _ in range(4):
            studies[0].optimize(objective, n_trials=2)
            studies[1].optimize(lambda trial: -float(score(other_space.suggest(trial))), n_trials=1)
    for one, other in zip(alone, in_turn, strict=True):
        assert [t.params for t in one.trials] == [t.params for t in other.trials]


def test_the_default_device_of_torch_does_not_matter():
    torch = pytest.importorskip("torch")

    def proposed():
        study = new_study(prior="pretrained")
        study.optimize(objective, n_trials=4)
        return [t.params for t in study.trials]

    on_cpu = proposed()
    torch.set_default_device("meta")  # as little use as a GPU that is full
    try:
        assert proposed() == on_cpu
    finally:
        torch.set_default_device(None)


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


@pytest.mark.parametrize("name", ["layer_{}_rank", "r_l{}", "model.layers.{}.mlp.r", "rank_attn_{}"])
def test_it_goes_on_where_anothers_study_stopped(name):
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=0))
    study.optimize(anyones(name), n_trials=15)
    before = [t.value for t in study.trials]
    study.sampler = RankAdaptorSampler(prior=None, seed=0)
    study.optimize(anyones(name), n_trials=15)
    after = [t.value for t in study.trials[15:]]
    assert np.mean(after) > np.mean(before[-10:]) + 10
    assert max(after) > max(before)


@pytest.mark.parametrize("name", ["model.layers.{}.mlp.r", "rank_attn_{}", "categorical_{}"])
def test_anyones_ranks_are_learned_along_the_depth_at_once(name):
    def run(trial):
        ranks = {
            i: trial.suggest_categorical(name.format(i), [16, 4, 8, 2])
            if "categorical" in name
            else trial.suggest_int(name.format(i), 2, 16, step=2)
            for i in range(24)
        }
        return float(sum((1 if layer < 12 else -1) * np.log2(1 + rank) for layer, rank in ranks.items()))

    ahead = []
    for seed in range(4):
        study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=seed))
        study.optimize(run, n_trials=12)
        best = study.best_value
        study.sampler = RankAdaptorSampler(prior=None, seed=seed)
        study.optimize(run, n_trials=2)
        ahead.append(min(t.value for t in study.trials[12:]) - best)
    assert np.mean(ahead) > 5


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
    assert not HAS_SET_CONSTRAINT or study.trials[0].constraints["budget"] > 0


def test_a_fully_enqueued_trial_is_run_as_it_is():
    study = new_study()
    study.optimize(objective, n_trials=2)
    given = {SPACE.name(layer): 12 for layer in SPACE.layers}
    study.enqueue_trial(given)
    study.optimize(objective, n_trials=2)
    assert study.trials[2].params == given
    assert SPACE.is_feasible(ranks_of(study.trials[3]))


@pytest.mark.parametrize("n_given", [1, 4, 8])
def test_a_trial_of_a_killed_worker_is_run_again_with_its_ranks_and_within_the_budget(n_given):
    study = new_study()
    study.optimize(objective, n_trials=3)
    killed = study.ask()
    for layer in range(n_given):  # it had stored so many
        killed.suggest_int(SPACE.name(layer), 2, 12, step=2)
    study.tell(killed, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[3])
    study.optimize(objective, n_trials=3)
    again = study.trials[4]
    assert study.trials[3].params.items() <= again.params.items()
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3 + [TrialState.FAIL] + [TrialState.COMPLETE] * 3
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials[4:])
    assert len({tuple(t.params.values()) for t in study.trials[4:]}) == 3
    assert sum(is_uniform(t) for t in study.trials if len(t.params) == 8) == 1


@pytest.mark.parametrize("finished", [0, 5])
def test_eight_workers_at_once_get_eight_configurations(finished):
    study = new_study()
    study.optimize(objective, n_trials=finished)
    trials = [study.ask() for _ in range(8)]
    for trial in trials:
        SPACE.suggest(trial)
    assert len({tuple(t.params.values()) for t in study.trials}) == finished + 8


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.COMPLETE])
@pytest.mark.parametrize("finished", [0, 5])
def test_what_another_worker_announces_at_the_same_moment_is_left_to_it(finished, state, monkeypatch):
    study = new_study()
    study.optimize(objective, n_trials=finished)
    rival, late = study.ask(), study.ask()
    announce, clashes = study._storage.set_trial_system_attr, []

    def announce_after_the_rival(trial_id, key, ranks):
        if not clashes:
            clashes.append(ranks)
            for layer, rank in zip(SPACE.layers, ranks, strict=True):
                study._storage.set_trial_param(rival._trial_id, SPACE.name(layer), float(rank), RANK)
            if state is TrialState.COMPLETE:
                study.tell(rival, 1.0)
        announce(trial_id, key, ranks)

    monkeypatch.setattr(study._storage, "set_trial_system_attr", announce_after_the_rival)
    assert [*SPACE.suggest(late).values()] != clashes[0]


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


def limited(given, seed=0, *, prune=False, n_trials=30):
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
    "none below 0": lambda over: max(0.0, over),
    "infinite": lambda over: math.inf if over > 0 else -1.0,
}


@pytest.mark.parametrize("given", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_infeasible_ranks_are_avoided_without_giving_up_the_search(given):
    ignored = [limited(lambda over: None, seed)[0] for seed in range(4)]
    heeded = [limited(given, seed) for seed in range(4)]
    assert np.mean(ignored) > 0.9
    assert np.mean([share for share, _ in heeded]) < 0.65
    assert np.mean([best for _, best in heeded]) > score(SPACE.uniform())


def test_infeasible_trials_that_are_pruned_at_once_are_avoided_too():
    assert limited(float, prune=True)[0] < 0.3
    assert limited(lambda over: None, prune=True)[0] > 0.8


def test_infeasible_values_of_other_parameters_are_avoided():
    def run(trial):
        rate = np.log10(trial.suggest_float("rate", 1e-5, 1e-1, log=True))
        constrain(trial, rate + 3)  # diverges beyond 1e-3
        return objective(trial) + 10 * rate

    highest = []
    for seed in range(3):
        study = new_study(seed=seed)
        study.optimize(run, n_trials=25)
        rates = np.log10([t.params["rate"] for t in study.trials[10:]])
        assert np.mean(rates > -3) < 0.3
        highest.append(rates[rates <= -3].max())
    assert max(highest) > -3.5


@pytest.mark.skipif(not HAS_SET_CONSTRAINT, reason="Optuna 4 does not mark trials over the budget")
def test_trials_of_another_sampler_over_the_budget_do_not_narrow_the_search():
    proposed = []
    for space in (SPACE, RankSpace(8)):  # the same ranks, marked as infeasible or not
        study = new_study()
        study.sampler = RandomSampler(seed=0)
        study.optimize(lambda trial, space=space: float(score(space.suggest(trial))), n_trials=8)
        study.sampler = RankAdaptorSampler(SPACE, prior=None, seed=0)
        proposed.append([SPACE.suggest(study.ask()) for _ in range(4)])
        assert any(constraints_of(study)) is (space is SPACE)
    assert proposed[0] == proposed[1]


def test_two_objectives_spread_over_the_front_within_the_budget():
    def both(trial):
        ranks = SPACE.suggest(trial)
        return float(score(ranks)), SPACE.cost(ranks)

    late = []
    for seed in range(8):
        sampler = RankAdaptorSampler(SPACE, prior=None, seed=seed)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        study.optimize(both, n_trials=20)
        assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)
        costs = [t.values[1] / SPACE.budget for t in study.best_trials]
        assert len(costs) >= 5
        assert min(costs) < 0.5 < 0.9 < max(costs)
        late += [(t.values[0], 8 * t.values[1] / SPACE.budget) for t in study.trials[10:]]
    # nearer to a uniform rank (a fraction, too) of the same cost than to random ranks, which are worse by 11
    assert np.mean([value - score(dict.fromkeys(range(8), rank)) for value, rank in late]) > -5.5


@pytest.mark.parametrize("fixed", [2, 12])
def test_with_parameters_fixed_by_optuna_the_budget_still_holds(fixed):
    study = new_study()
    study.optimize(objective, n_trials=3)
    study.sampler = PartialFixedSampler({"layer_00_rank": fixed, "layer_05_rank": fixed}, study.sampler)
    study.optimize(objective, n_trials=8)
    for trial in study.trials[3:]:
        assert (trial.params["layer_00_rank"], trial.params["layer_05_rank"]) == (fixed, fixed)
        assert SPACE.is_feasible(ranks_of(trial))


def test_four_threads_share_a_study():
    study = new_study()
    study.optimize(objective, n_trials=24, n_jobs=4)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 24
    assert sum(is_uniform(t) for t in study.trials) == 1
    assert all(SPACE.is_feasible(ranks_of(t)) for t in study.trials)
    assert len({tuple(t.params.values()) for t in study.trials}) == 24


FOUR_PROCESSES = """
import multiprocessing
import sys
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rankadaptor_optuna import RankAdaptorSampler, RankSpace
optuna.logging.set_verbosity(optuna.logging.ERROR)
space = RankSpace(4, (2, 4, 8), "uniform:4")
def work():
    for storage in (sys.argv[1], JournalStorage(JournalFileBackend(sys.argv[2]))):
        sampler = RankAdaptorSampler(space, prior=None, seed=0)
        study = optuna.load_study(study_name="s", storage=storage, sampler=sampler)
        study.optimize(lambda trial: float(sum(space.suggest(trial).values())), n_trials=5)
forked = multiprocessing.get_context("fork")
workers = [forked.Process(target=work) for _ in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
sys.exit(any(worker.exitcode for worker in workers))
"""


@pytest.fixture(scope="module")
def by_four_processes(tmp_path_factory):
    """A study in SQLite and one in a journal, by four processes that start together."""
    if sys.platform == "win32":
        pytest.skip("Windows has no fork")
    folder = tmp_path_factory.mktemp("four")
    url, log = f"sqlite:///{folder / 'study.db'}", str(folder / "study.log")
    studies = {
        "sqlite": optuna.create_study(storage=url, study_name="s"),
        "journal": optuna.create_study(storage=JournalStorage(JournalFileBackend(log)), study_name="s"),
    }
    subprocess.run([sys.executable, "-c", FOUR_PROCESSES, url, log], check=True, timeout=120)
    return studies


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_four_processes_on_one_storage_never_repeat_each_other(by_four_processes, kind):
    trials = by_four_processes[kind].trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 20
    assert len({tuple(t.params.values()) for t in trials}) == 20
    assert sum(set(t.params.values()) == {4} for t in trials) == 1


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


def test_conditional_parameters_are_sampled_beside_what_all_trials_have_in_common():
    def run(trial):
        rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
        if trial.suggest_categorical("adapter", ["lora", "prefix"]) == "prefix":
            return -20.0 - trial.suggest_int("prefix_length", 1, 64) / 64
        ranks = {i: trial.suggest_int(f"r_{i}", 2, 16, step=2) for i in range(4)}
        return float(score(ranks) - 20 * abs(np.log10(rate) + 3))

    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0))
    study.optimize(run, n_trials=40)
    late = study.trials[20:]
    assert {t.params["adapter"] for t in study.trials[:20]} == {"lora", "prefix"}
    assert np.mean([t.params["adapter"] == "lora" for t in late]) > 0.7
    assert np.mean([abs(np.log10(t.params["rate"]) + 3) for t in late]) < 0.5
    assert len({t.params["r_0"] for t in late if "r_0" in t.params}) > 3


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


SENSITIVITY = {SPACE.name(layer): value for layer, value in enumerate([1.0, 1, 9, 1, 1, 6, 1, 1])}


def test_proposals_follow_the_layers_sensitivities_from_the_second_on():
    told, others = [], []
    for seed in range(8):
        study = new_study(seed=seed)
        first = study.ask()
        study.set_user_attr(SENSITIVITY_ATTR, SENSITIVITY)
        study.tell(first, objective(first))
        assert is_uniform(study.trials[0])
        ranks = SPACE.suggest(study.ask())
        told += [ranks[2], ranks[5]]
        others += [rank for layer, rank in ranks.items() if layer not in (2, 5)]
        assert SPACE.is_feasible(ranks)
    assert np.mean(told) > np.mean(others) + 2


def test_what_a_sampler_proposes_rests_on_the_stored_sensitivities_whichever_process_asks():
    proposals = []
    for known in (SENSITIVITY, SENSITIVITY, {}):
        study = new_study()
        study.optimize(objective, n_trials=3)
        study.set_user_attr(SENSITIVITY_ATTR, known)
        if len(proposals) == 1:
            study.sampler = RankAdaptorSampler(SPACE, prior=None, seed=0)  # has not seen the trials before
        proposals.append(SPACE.suggest(study.ask()))
    assert proposals[0] == proposals[1] != proposals[2]


def test_without_a_space_sensitivities_are_those_of_the_parameters_names():
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    study.optimize(objective, n_trials=3)
    study.set_user_attr(SENSITIVITY_ATTR, SENSITIVITY)
    assert recommend(study, prior=None).params != recommend(without_sensitivity(study), prior=None).params


def without_sensitivity(study):
    other = optuna.create_study(direction="maximize")
    other.add_trials(study.trials)
    return other
