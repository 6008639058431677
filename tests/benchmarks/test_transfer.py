from __future__ import annotations

import numpy as np
import pytest

from benchmarks.race import transfer
from benchmarks.tasks.collect import Collected, configurations
from benchmarks.tasks.synthetic import Synthetic
from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.surrogate.grid import RankGrid


@pytest.fixture(scope="module")
def sources():
    """Two tasks of each of two families; later layers are worth more rank."""

    def source(name, n_layers):
        space = RankSpace(n_layers, (0, 2, 4, 8, 12), "uniform:4")
        ranks = np.asarray([list(ranks.values()) for ranks in configurations(space, 12)], dtype=float)
        scores = np.log1p(ranks) @ np.linspace(0, 1, n_layers)
        task = MetaTask(RankGrid.from_space(space), ranks, scores, name=name, family=name[0])
        return Collected(task, space, {}, float(-scores.min()) + 1, 0.0)

    return [source("a one", 5), source("a two", 6), source("b one", 7), source("b two", 9)]


def test_a_source_keeps_the_budget_and_the_trend_along_the_depth():
    space = RankSpace(11, (0, 4, 8, 16, 32), "uniform:8", costs=np.linspace(1, 1.5, 11))
    depth = np.linspace(0, 1, 6)
    for ranks in ([2, 2, 4, 8, 8, 12], [12, 8, 8, 4, 2, 2]):
        found = transfer.mapped(np.asarray(ranks, float), depth, space)
        assert space.is_feasible(found)
        assert space.cost(found) > 0.9 * space.budget
        along = np.polyfit(np.arange(11), list(found.values()), 1)[0]
        assert np.sign(along) == np.sign(ranks[-1] - ranks[0])
    assert transfer.mapped(np.zeros(6), depth, space) == space.uniform()


def test_source_trials_are_on_the_targets_scale_of_losses(sources, monkeypatch):
    monkeypatch.setattr(transfer, "N_BEST", 3)
    monkeypatch.setattr(transfer, "N_RANDOM", 2)
    space = RankSpace(10, budget="uniform:8")
    found = transfer.source_trials(sources[:2], space, uniform=2.0, pruned=3.0)
    assert len(found) == 2 * 5
    assert found == transfer.source_trials(sources[:2], space, uniform=2.0, pruned=3.0)
    losses = -sources[0].task.scores
    best = 2.0 + (losses.min() - losses[0]) / (sources[0].pruned_loss - losses[0])
    assert min(loss for _, loss in found[:5]) == pytest.approx(best)
    assert best < 2.0


def test_the_held_out_family_is_not_learned_from_and_each_search_knows_what_it_may(sources, tmp_path, monkeypatch):
    task = Synthetic("a", smooth=True, noise=0.5, seed=9)
    task.pruned_loss, task.sensitivity = 9.0, lambda seed: dict.fromkeys(task.space.layers, seed + 1.0)
    learned_from, searches = [], []

    def priors_of(sources, folder):
        learned_from.extend(source.task.name for source in sources)
        return "key", dict.fromkeys(transfer.WITH)

    def search(space, losses, trials, n_trials, seeds, makers, *, sources, sensitivities):
        searches.append(set(makers))
        assert {who for who, _ in sources} == {transfer.WARM}
        assert {who for who, _ in sensitivities} == set(transfer.WITH)
        assert sensitivities[transfer.NONE, 1] == dict.fromkeys(space.distributions(), 2.0)
        return {}

    monkeypatch.setattr(transfer, "priors_of", priors_of)
    monkeypatch.setattr(transfer, "search", search)
    monkeypatch.setattr(transfer, "measure", lambda *args: args)
    transfer.transfer("a", task, sources, tmp_path, 5, 2)
    assert learned_from == ["b one", "b two"]
    alone = {transfer.NONE, transfer.NONE + transfer.TOLD[1], "TPE", "GP", "Random"}
    assert searches == [alone, set(transfer.LEARNED)]
    with pytest.raises(ValueError, match="a prior for b needs two tasks of other families, 0 are collected"):
        transfer.others(sources[2:], "b")


def test_an_adversarial_prior_expects_the_opposite(sources, tmp_path):
    _, priors = transfer.priors_of(sources, tmp_path)
    space = RankSpace(8, (0, 2, 4, 8, 12), "uniform:4")
    rising, falling = np.asarray([[0, 0, 2, 2, 4, 4, 8, 12], [12, 8, 4, 4, 2, 2, 0, 0]])
    gains = {}
    for who, prior in priors.items():
        predicted = PerformanceModel(space, prior=prior).predict(np.stack([rising, falling]))[0]
        gains[who] = float(predicted[0] - predicted[1])
    assert gains[transfer.PRIOR] > gains[transfer.NONE] > gains[transfer.ADVERSARIAL]


def test_trials_needed_are_read_off_the_monotone_curve():
    curve = {5: 0.8, 10: 0.4, 15: 0.6, 20: 0.4, 25: 0.2}
    assert transfer.needed(curve, 0.9) == 5
    assert transfer.needed(curve, 0.6) == pytest.approx(7.5)
    assert transfer.needed(curve, 0.4) == 10
    assert transfer.needed(curve, 0.3) == pytest.approx(22.5)
    assert transfer.needed(curve, 0.1) == 50  # never


def test_the_checks_are_of_the_mean_regret_over_families():
    checkpoints = transfer.CHECKPOINTS
    priors = {"helped": 0.3, "not helped": 0.75}

    def found(prior):
        def losses(*values):
            return {n: [v, v + 0.02] for n, v in zip(checkpoints, values, strict=True)}

        who = dict.fromkeys(transfer.PEERS, losses(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5))
        who[transfer.PRIOR] = losses(*[prior] * 7)
        who[transfer.NONE] = losses(0.9, 0.8, 0.7, 0.65, 0.6, 0.4, 0.4)
        who[transfer.ADVERSARIAL] = losses(0.9, 0.85, 0.8, 0.75, 0.7, 0.55, 0.05)
        who |= {one + transfer.TOLD[1]: losses(*[0.5 - 0.01 * i] * 7) for i, one in enumerate(transfer.WITH)}
        return {"best": 0.0, "random": 1.0, "losses": who}

    rows, checks = transfer.summarise({name: transfer.regrets(found(prior)) for name, prior in priors.items()})
    (to_peer, cost_to_peer, cost_to_none), alone = list(checks.values())[:3], list(checks.values())[3:]
    assert to_peer == {"value": pytest.approx(0.525 - 0.5, abs=1e-3), "goal": "<= 0", "ok": False}
    assert cost_to_peer == {"value": 16 / 12.5, "goal": "<= 1.2", "ok": False}
    assert cost_to_none == {"value": 18 / 15, "goal": "<= 1.2", "ok": True}
    assert [one["value"] for one in alone] == [pytest.approx(0), 1, 1]
    of_all = next(row for row in rows if (row["family"], row["who"]) == ("all", transfer.PRIOR))
    assert of_all["regret@10"].startswith("0.535 ±")
    assert {"p to none@5", "p to none@10"} <= of_all.keys()


def test_differences_are_paired_by_search_and_as_sure_as_the_searches_are_alike():
    def family(prior, none):
        at = dict.fromkeys(transfer.CHECKPOINTS, np.zeros(4))
        who = dict.fromkeys((*(one + told for one in transfer.WITH for told in transfer.TOLD), *transfer.PEERS), at)
        return who | {transfer.PRIOR: at | {10: np.asarray(prior)}, transfer.NONE: at | {10: np.asarray(none)}}

    rows = transfer.differences(
        {"one": family([0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.6]), "other": family([0.5, 0, 0.5, 0], [0] * 4)}
    )
    found = {(row["regret"], row["less that of"]): row["is"] for row in rows}
    half = 1.96 * np.sqrt(np.var([0.5, 0, 0.5, 0], ddof=1) / 4) / 2  # the first family's difference is always the same
    assert found[f"{transfer.PRIOR} @10", f"{transfer.NONE} @10"] == f"+0.025 ±{half:.3f}"
    assert found[f"{transfer.PRIOR} @10", "GP @25"].startswith("+0.250 ±")
