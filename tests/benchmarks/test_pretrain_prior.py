from __future__ import annotations

import pytest

from rankadaptor_optuna.surrogate.prior import PRETRAINED, load_prior


@pytest.fixture(scope="module")
def script():
    from benchmarks.prior import pretrain as pretrain_prior

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
    for by in found.values():
        (told, without_told), (untold, without_untold) = (by[key][0] for key in script.SENSITIVITIES)
        assert len(told) == len(untold) == len(without_told) == len(script.LEARNED_FROM)
        assert told != without_told
        assert untold != without_untold
        assert without_told[0] > without_untold[0]
        assert without_untold[-1] > without_untold[0]
        assert without_untold[-1] > 0.5
    rows, checks = script.summarise(found)
    assert len(rows) == len(checks) == 2 * len(script.LEARNED_FROM)


def test_the_shipped_prior_was_learned_from_collected_tasks_and_is_small(script):
    collected = {script.read_task(file).name for file in script.files()}
    assert {task["name"] for task in load_prior("pretrained").card["tasks"]} <= collected
    assert PRETRAINED.stat().st_size < 1_000_000
