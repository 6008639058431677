from __future__ import annotations

import pytest

from rankadaptor_optuna.surrogate.prior import PRETRAINED, load_prior


@pytest.fixture(scope="module")
def script(importable):
    import pretrain_prior

    return pretrain_prior


def test_a_family_is_judged_with_a_prior_that_has_not_seen_it(script, monkeypatch):
    by_family = {}
    for file in script.files():
        task = script.read_task(file)
        by_family.setdefault(task.family, task)
    tasks = list(by_family.values())[:3]
    learned_from = []

    def learn(tasks):
        learned_from.append({task.family for task in tasks})
        return load_prior("pretrained")

    monkeypatch.setattr(script, "meta_train", learn)
    found = script.held_out(tasks, seeds=1)
    families = {task.family for task in tasks}
    assert learned_from == [families - {family} for family in sorted(families)]
    for ((with_prior, without),) in found.values():
        assert len(with_prior) == len(without) == len(script.LEARNED_FROM)
        assert with_prior != without
        assert without[-1] > 0.5
    more, fewer = (sum(without[i] for ((_, without),) in found.values()) for i in (-1, 0))
    assert more > fewer


def test_the_shipped_prior_was_learned_from_collected_tasks_and_is_small(script):
    collected = {script.read_task(file).name for file in script.files()}
    assert {task["name"] for task in load_prior("pretrained").card["tasks"]} <= collected
    assert PRETRAINED.stat().st_size < 1_000_000
