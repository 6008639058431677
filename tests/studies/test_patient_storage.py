from __future__ import annotations

import logging
import pickle
import sqlite3
import warnings

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study
from rankadaptor_optuna.database.attributes import RECIPE_ATTR
from rankadaptor_optuna.database.connections import UnreachableError
from rankadaptor_optuna.studies import patient_storage
from rankadaptor_optuna.studies.storage import open_storage

SPACE = RankSpace(6, (2, 4, 8), "uniform:4")
LOCKED = sqlite3.OperationalError("database is locked")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def slept(monkeypatch):
    """The pauses between attempts, which take no time; other threads wait as ever."""
    pauses = []
    monkeypatch.setattr(patient_storage.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def worker(url, name="s", **settings):
    """A study with a storage of its own, as another process has."""
    settings = {"recipe": {"task": "test"}, **settings}
    sampler = RankAdaptorSampler(SPACE, seed=0)
    return create_study(storage=open_storage(url), study_name=name, space=SPACE, sampler=sampler, **settings)


def objective(trial):
    return float(sum(i * rank for i, rank in SPACE.suggest(trial).items()))


def ask(study):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return study.ask()


def age_heartbeats(url):
    """As if the workers of all running trials were dead for long."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        assert connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2000-01-01'")).rowcount
    engine.dispose()


def away(study, monkeypatch, n_attempts, error=LOCKED):
    """Lets the next statements of a study's database fail."""
    dialect = study._storage._backend.engine.dialect
    execute, left = dialect.do_execute, [n_attempts]

    def failing(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return execute(*args, **kwargs)

    monkeypatch.setattr(dialect, "do_execute", failing)


def test_calls_wait_for_a_database_that_is_away_and_say_so_once(url, monkeypatch, slept, said):
    study = worker(url)
    trial = ask(study)
    away(study, monkeypatch, 5)
    trial.report(0.5, step=1)
    study.tell(trial, 1.0)
    assert slept == [0.1, 0.2, 0.4, 0.8, 1.6]
    told = [record.getMessage() for record in said.records]
    assert told[0] == f"Waiting up to 600 s for the database {url}: database is locked"
    assert told[1].startswith(f"The database {url} is back after ")
    assert len(told) == 2
    (stored,) = worker(url).trials
    assert (stored.value, stored.intermediate_values) == (1.0, {1: 0.5})


def test_a_database_that_stays_away_ends_the_worker_in_one_line(url, monkeypatch, slept):
    study = worker(url)
    study._storage._backend.patience = 0
    away(study, monkeypatch, 99)
    with pytest.raises(UnreachableError, match=r"the database .*study\.db was away for 0 s: database is locked"):
        study.optimize(objective, n_trials=1)


def test_a_database_that_refuses_is_not_waited_for(url, monkeypatch, slept):
    study = worker(url)
    away(study, monkeypatch, 99, sqlite3.OperationalError("attempt to write a readonly database"))
    with pytest.raises(ValueError, match=r"the database .*study\.db refused: attempt to write a readonly database"):
        study.set_user_attr("a", 1)
    assert slept == []


def test_a_result_whose_acknowledgement_was_lost_counts_as_stored(url, monkeypatch, slept):
    study = worker(url)
    trial = ask(study)
    dialect = study._storage._backend.engine.dialect
    commit, left = dialect.do_commit, [0]

    def committing(connection):
        commit(connection)
        if left[0]:
            left[0] -= 1
            raise LOCKED

    monkeypatch.setattr(dialect, "do_commit", committing)
    left[0] = 2  # reading the trial commits, too
    study.tell(trial, 1.0)
    assert worker(url).trials[0].value == 1.0


def test_the_ranks_of_a_worker_killed_while_it_asks_are_tried_by_another(url):
    victim = worker(url)
    ask(victim)  # no parameter is stored yet
    age_heartbeats(url)
    study = worker(url)
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    uniform = SPACE.to_params(SPACE.uniform())
    assert study.trials[1].params == uniform != study.trials[2].params


def test_a_trial_killed_before_its_first_heartbeat_fails_after_the_grace_period(url, monkeypatch):
    now = [0.0]
    study = worker(url)
    optuna.load_study(study_name="s", storage=url).ask()  # without heartbeats
    monkeypatch.setattr(patient_storage.time, "monotonic", lambda: now[0])
    study._storage._backend._last_away = -1e9
    states = []
    for now[0] in (0.0, 119.0, 121.0):
        optuna.storages.fail_stale_trials(study)
        states.append([t.state.name for t in study.trials])
    assert states == [["RUNNING"], ["RUNNING"], ["FAIL", "WAITING"]]


def test_workers_without_heartbeats_are_left_alone_where_no_recipe_rules(url, monkeypatch):
    study = worker(url, recipe=None)
    optuna.load_study(study_name="s", storage=url).ask()
    for now in (0.0, 1e6):
        monkeypatch.setattr(patient_storage.time, "monotonic", lambda now=now: now)
        optuna.storages.fail_stale_trials(study)
    assert study.trials[0].state is TrialState.RUNNING


def test_a_worker_paused_beyond_the_grace_period_warns_and_goes_on(url, said):
    paused = worker(url)

    def taken_over(trial):
        SPACE.suggest(trial)
        if trial.number == 0:
            age_heartbeats(url)
            other = worker(url)
            other.optimize(objective, n_trials=1)
            assert [t.state.name for t in other.trials] == ["FAIL", "COMPLETE"]
        trial.report(1.0, step=1)
        trial.set_user_attr("a", 1)
        return 5.0

    paused.optimize(taken_over, n_trials=2)
    assert [t.state.name for t in paused.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert paused.trials[1].params == paused.trials[0].params
    told = [record.getMessage() for record in said.records if "given to another worker" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("Trial 0 was given to another worker")


def test_trials_are_not_taken_for_dead_right_after_the_database_was_away(url, monkeypatch, slept):
    study, other = worker(url), worker(url)
    ask(other)
    age_heartbeats(url)
    away(study, monkeypatch, 1)
    study.optimize(objective, n_trials=1)
    assert [t.state.name for t in study.trials] == ["RUNNING", "COMPLETE"]


def test_of_two_recipes_set_at_the_same_moment_one_is_refused(url, monkeypatch):
    first = worker(url)
    first._storage._backend.set_first_study_user_attr(first._study_id, RECIPE_ATTR, {"task": "other"})
    assert first.user_attrs[RECIPE_ATTR] == {"task": "test"}
    with pytest.raises(ValueError, match="study 's' belongs to other settings: task was test, now other"):
        worker(url, recipe={"task": "other"})


def test_a_pickled_storage_waits_too(url, monkeypatch, slept):
    study = pickle.loads(pickle.dumps(worker(url)))
    away(study, monkeypatch, 1)
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state is TrialState.COMPLETE
    assert len(slept) == 1


def test_a_trial_of_optimize_that_is_interrupted_waits_for_a_worker(url):
    def interrupted(trial):
        value = objective(trial)
        if trial.number == 2:
            raise KeyboardInterrupt
        return value

    whole = worker(url, "whole")
    whole.optimize(objective, n_trials=4)
    study = worker(url)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(interrupted, n_trials=4)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "WAITING"]
    worker(url).optimize(objective, n_trials=2)
    assert [(t.params, t.value) for t in study.trials] == [(t.params, t.value) for t in whole.trials]


def test_a_trial_that_fails_by_itself_fails(url):
    study = worker(url)
    with pytest.raises(ZeroDivisionError):
        study.optimize(lambda trial: 1 / 0, n_trials=1)
    assert study.trials[0].state is TrialState.FAIL
