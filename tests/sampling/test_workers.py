from __future__ import annotations

import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from tests.sampling.common import RANK, SPACE, anyones, is_uniform, new_study, objective, ranks_of, score


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


@pytest.mark.parametrize("rival_is_earlier", [True, False])
def test_of_two_that_announce_the_uniform_configuration_at_once_the_earlier_trial_keeps_it(
    rival_is_earlier, monkeypatch
):
    study = new_study()
    if rival_is_earlier:  # it waits until the other trial has looked for uniform ones
        study.enqueue_trial({"rate": 0.5})
        trial = optuna.trial.Trial(study, study._storage.create_new_trial(study._study_id))
        rival = study.trials[0]
    else:
        trial, rival = study.ask(), study.ask()
    announce = study._storage.set_trial_system_attr

    def announce_with_the_rival(trial_id, key, ranks):
        monkeypatch.undo()
        if rival_is_earlier:
            study._storage.set_trial_state_values(rival._trial_id, TrialState.RUNNING)
        announce(rival._trial_id, key, [*SPACE.uniform().values()])
        announce(trial_id, key, ranks)

    monkeypatch.setattr(study._storage, "set_trial_system_attr", announce_with_the_rival)
    assert (SPACE.suggest(trial) == SPACE.uniform()) is not rival_is_earlier


def test_a_small_space_is_gone_through_without_repeats():
    space = RankSpace(3, (2, 4))
    study = new_study(space)
    for _ in range(8):  # nobody finishes
        space.suggest(study.ask())
    assert len({tuple(t.params.values()) for t in study.trials}) == 8
    space.suggest(study.ask())  # and one more is no error


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
        study.optimize(lambda trial: float(sum(space.suggest(trial).values())), n_trials=4)
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
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 16
    assert len({tuple(t.params.values()) for t in trials}) == 16
    assert sum(set(t.params.values()) == {4} for t in trials) == 1


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
