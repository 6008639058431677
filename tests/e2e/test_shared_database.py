"""Several processes on one study in a real shared database."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import optuna
import pytest

from rankadaptor_optuna import RankSpace, create_study, recommend
from rankadaptor_optuna.studies.storage import open_storage

pytestmark = pytest.mark.e2e

SPACE = 'RankSpace(12, budget="uniform:8", costs=range(10, 22), profile=[0.04 * i for i in range(12)])'
OPEN = f"""
import sys
from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study
space = {SPACE}
sampler = RankAdaptorSampler(space, seed=0)  # the same seed in every worker: the hardest case
study = create_study(storage=sys.argv[1], study_name="shared", space=space, sampler=sampler, recipe={{"task": "test"}})
"""
WORKER = f"""{OPEN}
sys.stdin.readline()
study.optimize(lambda trial: sum(r * i for i, r in space.suggest(trial).items()), n_trials=int(sys.argv[2]))
"""
SEARCH = f"""{OPEN}
import random, time
from types import SimpleNamespace
from rankadaptor_optuna.jobs.search import run_trials
class Job:
    training, direction = SimpleNamespace(steps=1), "maximize"
    def __call__(self, trial):
        ranks = space.suggest(trial)
        time.sleep(random.uniform(0.1, 1))
        return sum(r * i for i, r in ranks.items())
sys.stdin.readline()
run_trials(study, Job(), int(sys.argv[2]), shared=True)
print([t.number for t in study.trials if t.state.name == "COMPLETE"])
"""
KILLED = f"""
import time
import rankadaptor_optuna.studies.storage
rankadaptor_optuna.studies.storage._HEARTBEAT_S = 1
{OPEN}
def objective(trial):
    ranks = space.suggest(trial)
    if trial.number == 1:
        time.sleep(1)  # long enough for a first heartbeat
        print("in the middle of trial 1", flush=True)
        time.sleep(600)
    return sum(r * i for i, r in ranks.items())
study.optimize(objective, n_trials=2)
"""

TRAINS = f"""
{OPEN}
import time
def objective(trial):
    ranks = space.suggest(trial)
    print("trains", flush=True)
    for step in range(20):
        time.sleep(0.2)
        trial.report(step, step)
    return sum(r * i for i, r in ranks.items())
study.optimize(objective, n_trials=2)
"""


@pytest.fixture
def workers(url: str, at_once: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Runs n processes that begin their trials at the same moment, and returns what they print."""
    return lambda n, n_trials, code=WORKER: at_once(code, [url, str(n_trials)], n)


def test_two_workers_share_one_study(url: str, workers: Callable[..., list[str]]) -> None:
    workers(n=2, n_trials=12)
    study = optuna.load_study(study_name="shared", storage=url)
    space = eval(SPACE, {"RankSpace": RankSpace})
    configurations = [tuple(t.params[space.name(i)] for i in space.layers) for t in study.trials]
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 24
    assert all(space.is_feasible(dict(enumerate(c))) for c in configurations)
    assert len(set(configurations)) == 24, "no configuration is tried twice"
    assert tuple(space.uniform().values()) in configurations[:2], "uniform first, whichever of the two takes it"
    assert space.is_feasible(recommend(study).ranks), "the space was stored with the study"


def test_eight_workers_create_the_tables_of_a_fresh_database(url: str, workers: Callable[..., list[str]]) -> None:
    workers(n=8, n_trials=1)
    study = optuna.load_study(study_name="shared", storage=url)
    assert len(study.trials) == 8
    assert study.user_attrs["rankadaptor:recipe"] == {"task": "test"}


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_quickstarts_on_one_study_share_the_trials_and_end_with_the_same_ones(
    url: str, workers: Callable[..., list[str]]
) -> None:
    first, second = workers(n=2, n_trials=6, code=SEARCH)
    assert first == second
    n_trials = len(optuna.load_study(study_name="shared", storage=url).trials)
    assert n_trials in (6, 7), "both may ask for the last one at the same moment"


def test_a_worker_killed_in_its_trial_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout.readline() == "in the middle of trial 1\n"
        victim.kill()
    assert victim.returncode == -signal.SIGKILL
    monkeypatch.setattr("rankadaptor_optuna.studies.storage._HEARTBEAT_S", 1)
    space = eval(SPACE, {"RankSpace": RankSpace})
    study = create_study(storage=url, study_name="shared", space=space, recipe={"task": "test"})
    assert [t.state.name for t in study.trials] == ["COMPLETE", "RUNNING"]
    time.sleep(4)  # more than two heartbeats, of which some databases keep whole seconds
    study.optimize(lambda trial: sum(r * i for i, r in space.suggest(trial).items()), n_trials=2)
    uniform, killed, again, fresh = study.trials
    assert [t.state.name for t in (uniform, killed, again, fresh)] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert again.params == killed.params
    assert len(again.params) == 12
    assert fresh.params not in (uniform.params, killed.params)
    assert recommend(study).evidence.n_trials == 3


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_restart_of_the_server_costs_no_trial(url: str, postgres_server: tuple[str, Callable[..., None]]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", TRAINS, url]
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        for process in (one, other):
            assert process.stdout.readline() == "trains\n"
        postgres_server[1]("stop", "-m", "fast")
        time.sleep(3)
        postgres_server[1]("start")
        for process in (one, other):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert "Traceback" not in err
            assert err.count("Waiting up to 600 s for the database") == err.count(" is back after ") == 1
            assert "secret" not in err
    study = optuna.load_study(study_name="shared", storage=url)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4


def test_the_password_is_in_no_error(postgres: str) -> None:
    with pytest.raises(ValueError, match="cannot open the storage") as error:
        open_storage(f"{postgres}/no_such_database")
    assert "secret" not in str(error.value)
