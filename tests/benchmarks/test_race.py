from __future__ import annotations

import numpy as np
import optuna
import pytest

from rankadaptor_optuna import RankSpace


@pytest.fixture(scope="module")
def race():
    from benchmarks.race import race

    return race


@pytest.fixture
def task(race):
    return race.Synthetic("tiny", smooth=True, noise=0.5, seed=9)


@pytest.fixture
def found(race, task, tmp_path):
    return race.race("tiny", task, tmp_path, n_trials=10, seeds=2)


@pytest.mark.filterwarnings("ignore:AutoSampler is left out")
def test_every_competitor_starts_from_uniform_and_keeps_the_budget(race, task, tmp_path):
    for (who, _), study in race.search("tiny", task.space, *race.open_folder(tmp_path, "tiny", task), 4, 1).items():
        trials = race.finished(study)
        ranks = [race.ranks_of(who, task.space, optuna.trial.FixedTrial(t.params)) for t in trials]
        assert ranks[0] == task.space.uniform()
        assert all(map(task.space.is_feasible, ranks))
        assert [t.value for t in trials] == task.losses(ranks, [0] * 4)


@pytest.mark.filterwarnings("ignore:AutoSampler is left out")
def test_a_race_that_was_stopped_goes_on_and_computes_nothing_twice(race, task, tmp_path):
    who = ["RankAdaptor", "Random", "CMA-ES"]
    first = race.search("tiny", task.space, *race.open_folder(tmp_path, "tiny", task), 3, 1, who)
    before = {key: [t.params for t in race.finished(study)] for key, study in first.items()}
    scores, known = race.open_folder(tmp_path, "tiny", task)
    longer = race.search("tiny", task.space, scores, known, 5, 2, who)
    assert all(len(race.finished(study)) == 5 for study in longer.values())
    assert {key: [t.params for t in race.finished(longer[key])][:3] for key in before} == before
    again, known = race.open_folder(tmp_path, "tiny", task)
    same = race.search("tiny", task.space, again, known, 5, 2, who)
    assert scores.n_computed > again.n_computed == 0
    for key, study in same.items():
        assert [(t.params, t.value) for t in race.finished(study)] == [
            (t.params, t.value) for t in race.finished(longer[key])
        ]


@pytest.mark.filterwarnings("ignore:AutoSampler is left out")
def test_a_finished_search_is_read_not_made_again(race, task, tmp_path, monkeypatch):
    who = ["TPE", "CMA-ES"]
    first = race.search("tiny", task.space, *race.open_folder(tmp_path, "tiny", task), 4, 2, who)
    monkeypatch.delattr(optuna.Study, "ask")
    again = race.search("tiny", task.space, *race.open_folder(tmp_path, "tiny", task), 4, 2, who)
    for key, study in again.items():
        assert [t.params for t in race.finished(study)] == [t.params for t in race.finished(first[key])]


@pytest.mark.filterwarnings("ignore:AutoSampler is left out")
def test_the_studies_of_a_race_can_be_kept_to_be_browsed(race, task, tmp_path):
    storage = race.RDBStorage(f"sqlite:///{tmp_path / 'race.db'}")
    race.search("tiny", task.space, *race.open_folder(tmp_path, "tiny", task), 3, 1, ["TPE"], storage)
    study = optuna.load_study(study_name="tiny/TPE/0", storage=storage)
    assert len(race.finished(study)) == 3


@pytest.mark.filterwarnings("ignore:AutoSampler is left out")
def test_regret_is_0_at_the_optimum_and_1_for_random_allocations(race, task, found):
    assert found["best"] == pytest.approx(task.losses([task.optimum], [0], report=True)[0])
    assert found["correlation between seeds"] == pytest.approx(1)  # a world's report has no noise
    assert race.regret(found, found["best"]) == 0
    assert race.regret(found, found["random"]) == pytest.approx(1)
    rows, checks = race.summarise([found], [10])
    assert {row["who"] for row in rows} >= {"RankAdaptor, recommend", "TPE", "GP", "uniform"}
    ratio, worse = checks.values()
    mine = np.mean(race.regret(found, found["losses"]["RankAdaptor, recommend"][10]))
    assert ratio["ok"] == (ratio["value"] <= 0.6)
    assert ratio["value"] * min(
        np.mean(race.regret(found, losses[10]))
        for who, losses in found["losses"].items()
        if "RankAdaptor" not in who and "recommend" not in who
    ) == pytest.approx(mine, rel=1e-3)
    assert worse["goal"] == "<= 0"


def test_losses_of_another_machines_models_are_refused(race, task, tmp_path):
    losses = race.Losses(task, tmp_path / "losses.csv")
    asked = [(task.space.uniform(), 3), (task.space.uniform(), 4)]
    measured = losses(asked)
    assert race.Losses(task, tmp_path / "losses.csv")(asked) == measured
    other = race.Synthetic("other", smooth=True, noise=0.5, seed=10)
    with pytest.raises(ValueError, match="move it away"):
        race.Losses(other, tmp_path / "losses.csv")


def test_the_equivalent_rank_is_read_off_the_uniform_curve(race):
    found = {"curve": {4: 3.0, 8: 2.0, 16: 1.0}}
    assert race.equivalent_rank(found, 2.0) == pytest.approx(8)
    assert race.equivalent_rank(found, 1.5) == pytest.approx(8 * 2**0.5)
    assert race.equivalent_rank(found, 0.0) == 16


@pytest.mark.parametrize("costs", [[1] * 6, [1, 2, 1, 3, 1, 1]])
def test_a_projection_uses_up_the_budget_and_keeps_the_order(race, costs):
    from benchmarks.race.peers import projected

    space = RankSpace(6, (0, 4, 8, 16, 32), "uniform:8", costs=costs)
    for wanted in ([32] * 6, [0] * 6, [0, 4, 8, 16, 32, 32]):
        ranks = projected(space, dict(enumerate(wanted)))
        assert space.is_feasible(ranks)
        for layer, rank in ranks.items():
            raised = next((c for c in space.candidates if c > rank), None)
            assert raised is None or not space.is_feasible({**ranks, layer: raised})
        if len(set(costs)) == 1 and len(set(wanted)) > 1:
            assert list(ranks.values()) == sorted(ranks.values())
