from __future__ import annotations

from benchmarks.prior import pretrain
from benchmarks.tasks.collect import collected
from rankadaptor_optuna.surrogate.prior import load_prior


def test_a_family_is_judged_with_a_prior_that_has_not_seen_it(monkeypatch):
    tasks = list({one.task.family: one.task for one in collected()}.values())[:2]
    learned_from = []

    def learn(tasks):
        learned_from.append({task.family for task in tasks})
        return load_prior("pretrained")

    monkeypatch.setattr(pretrain, "meta_train", learn)
    found = pretrain.held_out(tasks, seeds=1)
    families = {task.family for task in tasks}
    assert learned_from == [families - {family} for family in sorted(families)]
    for by in found.values():
        (told, without_told), (untold, without_untold) = (by[key][0] for key in pretrain.SENSITIVITIES)
        assert told != without_told
        assert untold != without_untold
        assert without_told[0] > without_untold[0]
        assert without_untold[-1] > max(without_untold[0], 0.5)


def test_gains_are_over_families_and_their_mean_is_the_goal():
    def family(gain):
        pair = ([0.5 + gain] * 4, [0.5] * 4)
        return {"known": [pair, pair], "unknown": [pair]}

    rows, checks = pretrain.summarise({"a": family(0.1), "b": family(-0.3)})
    assert [row["not helped"] for row in rows] == ["b"] * 8
    assert [check["value"] for check in checks.values()] == [-0.1] * 8
    assert rows[0]["with the prior"].startswith("0.400 ±")
