from __future__ import annotations

import numpy as np
import optuna
import pytest

from benchmarks.race import race, search
from benchmarks.race.peers import PROPOSES_RANKS, projected, ranks_of, sampler_of, samplers
from benchmarks.race.regret import equivalent_rank, measure, regret
from benchmarks.tasks.synthetic import Synthetic
from rankadaptor_optuna import RankSpace

pytestmark = pytest.mark.filterwarnings("ignore:AutoSampler is left out")


@pytest.fixture
def task():
    return Synthetic("tiny", smooth=True, noise=0.5, seed=9)


def test_every_competitor_starts_from_uniform_keeps_the_budget_and_is_read_not_asked_again(task, tmp_path, monkeypatch):
    losses, trials = search.open_folder(tmp_path, "tiny", task)
    studies = search.search(task.space, losses, trials, 4, 1, samplers())
    params = {key: [t.params for t in search.finished(study)] for key, study in studies.items()}
    for (who, _), study in studies.items():
        ranks = [ranks_of(who, task.space, optuna.trial.FixedTrial(t.params)) for t in search.finished(study)]
        assert ranks[0] == task.space.uniform()
        assert all(map(task.space.is_feasible, ranks))
        assert [t.value for t in search.finished(study)] == task.losses(ranks, [0] * 4)
    monkeypatch.delattr(optuna.Study, "ask")
    losses, trials = search.open_folder(tmp_path, "tiny", task)
    again = search.search(task.space, losses, trials, 4, 1, samplers())
    assert losses.n_computed == 0
    assert params == {key: [t.params for t in search.finished(study)] for key, study in again.items()}


def test_a_search_that_goes_on_computes_no_loss_twice(task, tmp_path):
    makers = {who: samplers()[who] for who in ("RankAdaptor", "Random", "CMA-ES")}
    losses, trials = search.open_folder(tmp_path, "tiny", task)
    first = search.search(task.space, losses, trials, 3, 1, makers)
    before = {key: [t.params for t in search.finished(study)] for key, study in first.items()}
    losses, trials = search.open_folder(tmp_path, "tiny", task)
    longer = search.search(task.space, losses, trials, 5, 1, makers)
    assert {key: [t.params for t in search.finished(longer[key])][:3] for key in before} == before
    assert 0 < losses.n_computed <= 3 * 2


def test_regret_is_0_at_the_optimum_and_1_for_random_allocations(task, tmp_path):
    losses, _ = search.open_folder(tmp_path, "tiny", task)
    found = measure("tiny", task, losses, {("TPE", 10, 0): task.space.uniform()})
    assert found["best"] == pytest.approx(task.losses([task.optimum], [0], report=True)[0])
    assert found["correlation between seeds"] == pytest.approx(1)  # a synthetic report has no noise
    assert regret(found, found["best"]) == 0
    assert regret(found, found["random"]) == pytest.approx(1)
    assert found["losses"]["TPE"][10] == [found["uniform"]]


def test_the_checks_compare_the_recommendation_with_the_best_peer_and_count_better_peers():
    def task(name, ours, tpe, gp):
        seeds = np.linspace(-0.01, 0.01, 8)
        losses = {"RankAdaptor": 0.9, race.RECOMMEND: ours, "TPE": tpe, "GP": gp, "Random, recommend": 0.0}
        by = {who: {10: (loss + seeds * (1 + i)).tolist()} for i, (who, loss) in enumerate(losses.items())}
        return {"task": name, "best": 0.0, "random": 1.0, "uniform": 0.7, "curve": {4: 1.0, 8: 0.5}, "losses": by}

    rows, checks = race.summarise([task("one", 0.2, 0.5, 0.6), task("two", 0.4, 0.1, 0.9)], [10])
    ratio, worse = checks.items()
    assert ratio[0].endswith("(TPE)")
    assert ratio[1] == {"value": 1.0, "goal": "<= 0.6", "ok": False}
    assert worse[0].endswith("TPE on two")
    assert worse[1] == {"value": 1.0, "goal": "<= 0", "ok": False}
    assert [row["regret@10"] for row in rows if row["task"] == "all"][:3] == ["0.900", "0.300", "0.300"]


def test_the_equivalent_rank_is_read_off_the_uniform_curve():
    found = {"curve": {4: 3.0, 8: 2.0, 16: 1.0}}
    assert equivalent_rank(found, 2.0) == pytest.approx(8)
    assert equivalent_rank(found, 1.5) == pytest.approx(8 * 2**0.5)
    assert equivalent_rank(found, 0.0) == 16


@pytest.mark.parametrize("costs", [[1] * 6, [1, 2, 1, 3, 1, 1]])
def test_a_projection_uses_up_the_budget_and_keeps_the_order(costs):
    space = RankSpace(6, (0, 4, 8, 16, 32), "uniform:8", costs=costs)
    for wanted in ([32] * 6, [0] * 6, [0, 4, 8, 16, 32, 32]):
        ranks = projected(space, dict(enumerate(wanted)))
        assert space.is_feasible(ranks)
        for layer, rank in ranks.items():
            raised = next((c for c in space.candidates if c > rank), None)
            assert raised is None or not space.is_feasible({**ranks, layer: raised})
        if len(set(costs)) == 1 and len(set(wanted)) > 1:
            assert list(ranks.values()) == sorted(ranks.values())


def test_a_competitors_name_starts_with_its_sampler():
    assert sampler_of(race.ALONE) in PROPOSES_RANKS
    assert sampler_of("TPE, warm-started") == "TPE"
