from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankadaptor_optuna import RankSpace


@pytest.fixture
def losses():
    from benchmarks.tasks import losses

    return losses


def test_sensitivities_are_measured_once_a_seed_and_kept(losses, tmp_path):
    asked = []

    def sensitivity(seed):
        asked.append(seed)
        return {0: seed + 1 / 3, 2: 1e-9, 3: -0.25}

    task = SimpleNamespace(space=RankSpace(4, layers=[0, 2, 3]), sensitivity=sensitivity)
    first = losses.Sensitivities(task, tmp_path / "s.csv")
    found = [first(seed) for seed in (0, 5, 0)]
    assert found[0] == found[2] == {"layer_00_rank": 0.333333, "layer_02_rank": 1e-9, "layer_03_rank": -0.25}
    again = losses.Sensitivities(task, tmp_path / "s.csv")
    assert [again(5), again(0)] == [found[1], found[0]]
    assert asked == [0, 5]
