"""Several processes on one study in a real shared database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from rankadaptor_optuna import RankSpace, recommend
from rankadaptor_optuna.study import open_storage

pytestmark = pytest.mark.e2e

SPACE = 'RankSpace(12, budget="uniform:8", costs=range(10, 22), profile=[0.04 * i for i in range(12)])'
WORKER = f"""
import sys
import optuna
from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study
space = {SPACE}
sampler = RankAdaptorSampler(space, seed=0)  # the same seed in every worker: the hardest case
study = create_study(storage=sys.argv[1], study_name="shared", space=space, sampler=sampler, recipe={{"task": "test"}})
sys.stdin.readline()
study.optimize(lambda trial: sum(r * i for i, r in space.suggest(trial).items()), n_trials=int(sys.argv[2]))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    server = request.getfixturevalue("postgres")
    name = f"test_{abs(hash(tmp_path.name)) % 10**8}"
    engine = sqlalchemy.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"


def workers(url: str, n: int, n_trials: int) -> None:
    """Starts n processes at once and lets them all begin their trials at the same moment."""
    command = [sys.executable, "-c", WORKER, url, str(n_trials)]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(n)]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


def test_two_workers_share_one_study(url: str) -> None:
    workers(url, n=2, n_trials=12)
    study = optuna.load_study(study_name="shared", storage=url)
    space = eval(SPACE, {"RankSpace": RankSpace})
    configurations = [tuple(t.params[space.name(i)] for i in space.layers) for t in study.trials]
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 24
    assert all(space.is_feasible(dict(enumerate(c))) for c in configurations)
    assert len(set(configurations)) == 24, "no configuration is tried twice"
    assert sum(len(set(c)) == 1 for c in configurations) == 1, "uniform once, first"
    assert space.is_feasible(recommend(study).ranks), "the space was stored with the study"


def test_eight_workers_create_the_tables_of_a_fresh_database(url: str) -> None:
    workers(url, n=8, n_trials=1)
    study = optuna.load_study(study_name="shared", storage=url)
    assert len(study.trials) == 8
    assert study.user_attrs["rankadaptor:recipe"] == {"task": "test"}


def test_the_password_is_in_no_error(postgres: str) -> None:
    with pytest.raises(ValueError, match="cannot open the storage") as error:
        open_storage(f"{postgres}/no_such_database")
    assert "secret" not in str(error.value)
