"""A tiny race whose losses, trials and table are kept in replay/.

``PYTHONPATH=. python tests/benchmarks/test_replay.py`` makes it anew. All configurations within the budget are
kept, so that any search, with any performance model, finds its losses there.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.race import race, regret, search
from benchmarks.race.peers import samplers
from benchmarks.report import FRESH, set_up
from benchmarks.tasks.losses import Losses
from benchmarks.tasks.recovery import load_task
from benchmarks.tasks.specs import TINY
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.ranks import Ranks

REPLAY = Path(__file__).parent / "replay"
SEEDS = 2
SPEC = replace(TINY, candidates=(2, 4, 8), budget="uniform:4")

pytestmark = pytest.mark.filterwarnings("ignore:AutoSampler is left out")


def few_samplers():
    return {who: samplers()[who] for who in ("RankAdaptor", "TPE", "GP", "Random")}


@pytest.fixture(autouse=True)
def _few_competitors(monkeypatch):
    monkeypatch.setattr(race, "samplers", few_samplers)


class KeptTask:
    """The task of the kept race, which recovers nothing."""

    def __init__(self):
        self.space = RankSpace.from_dict(json.loads((REPLAY / "space.json").read_text()))

    def losses(self, configurations, seed, *, report=False):
        """The first kept loss, with which kept losses are checked."""
        first = (REPLAY / "tiny.csv").read_text().splitlines()[1].split(",")
        assert [f"{seed[0]}", ("search", "report")[report], " ".join(map(str, configurations[0].values()))] == first[:3]
        return [float(first[3])]

    def sensitivity(self, seed):
        """No sensitivity is measured anew."""
        raise AssertionError("a kept sensitivity is missing")


def half_way(who, study, space, n):
    """Stands in for ``recommended``, so that the table depends on kept files alone."""
    return SimpleNamespace(ranks=search.best_trial(who, study, space, n // 2))


def table(monkeypatch):
    monkeypatch.setattr(race, "recommended", half_way)
    rows, checks = race.summarise([race.race("tiny", KeptTask(), REPLAY, 10, SEEDS)], [10])
    return {"rows": rows, "checks": checks}


def test_a_race_is_told_from_its_kept_files(monkeypatch):
    before = {file.name: file.read_text() for file in REPLAY.iterdir()}
    assert table(monkeypatch) == json.loads(before["table.json"])
    assert {file.name: file.read_text() for file in REPLAY.iterdir()} == before


def test_recommendations_of_the_performance_model_need_no_recovery():
    found = race.race("tiny", KeptTask(), REPLAY, 10, SEEDS)
    assert min(regret.regret(found, found["losses"][race.RECOMMEND][10])) > -1


def _remake():
    set_up()
    REPLAY.mkdir(exist_ok=True)
    for file in REPLAY.iterdir():
        file.unlink()
    with tempfile.TemporaryDirectory() as cache:
        task = load_task(SPEC, Path(cache))
    (REPLAY / "space.json").write_text(json.dumps(task.space.to_dict()) + "\n")
    losses = Losses(task, REPLAY / "tiny.csv")
    every = [Ranks(enumerate(ranks)) for ranks in itertools.product(task.space.candidates, repeat=4)]
    inside = [ranks for ranks in every if task.space.is_feasible(ranks)]
    losses([(ranks, seed) for ranks in inside for seed in range(SEEDS)])
    seeds = (*FRESH, *itertools.chain(*regret._CHOICE))
    losses([(ranks, seed) for ranks in inside for seed in seeds], report=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(race, "samplers", few_samplers)
        race.race("tiny", task, REPLAY, 10, SEEDS)
        (REPLAY / "table.json").write_text(json.dumps(table(monkeypatch), indent=1) + "\n")


if __name__ == "__main__":
    _remake()
