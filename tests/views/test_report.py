from __future__ import annotations

import optuna
import pytest

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.attributes import SENSITIVITY_ATTR


@pytest.fixture(params=["layer", "sublayer"])
def outcome(request):
    """What a quickstart found, with made-up measurements."""
    pytest.importorskip("matplotlib")
    from rankadaptor_optuna.jobs.quickstart import Outcome

    n = 4 if request.param == "layer" else 8
    settings = {"costs": range(10, 10 + n), "profile": [0.1 * i for i in range(n)], "granularity": request.param}
    space = RankSpace(6, (0, 4, 8), "uniform:4", layers=range(1, 5), fixed_ranks={0: 8, 5: 8}, **settings)
    study = optuna.create_study(sampler=RankAdaptorSampler(space, prior=None, seed=0))
    study.optimize(lambda trial: float(-sum(i * r for i, r in enumerate(space.suggest(trial).values()))), n_trials=6)
    dense, pruned = ({"loss": x, "accuracy": [0.5, 0.1], "parameters": 1000} for x in (2.0, 3.0))
    uniform, best = ({"losses": [x, x + 0.1], "accuracy": [0.5, 0.1], "parameters": 200} for x in (2.5, 2.4))
    return Outcome(study, recommend(study), space, dense, pruned, uniform, best, 1.0, {"seed": 0})


def test_the_report_has_a_row_of_ranks_for_each_part_that_has_its_own(outcome, tmp_path):
    from rankadaptor_optuna.views.report import write_report

    write_report(outcome, tmp_path)
    text, ranks = (tmp_path / "report.md").read_text(), list(outcome.recommendation.ranks.values())
    rows = ["| layer | 1 | 2 | 3 | 4 |"]
    rows += [
        "| " + " | ".join([name or "rank", *map(str, ranks[part])]) + " |"
        for name, part in outcome.space.series.items()
    ]
    assert "\n".join([rows[0], "| --- | --- | --- | --- | --- |", *rows[1:]]) in text
    assert "Pruning left layers 0, 5 whole" in text


@pytest.mark.parametrize("told", [False, True])
def test_the_picture_has_a_bar_for_each_rank_and_below_it_what_is_known_of_its_layer(outcome, told):
    from rankadaptor_optuna.views.report import ranks_figure
    from rankadaptor_optuna.views.study_view import read_study_view

    space, found = outcome.space, outcome.recommendation
    sensitivity = [0.5 + i for i in range(len(space.modules))]
    if told:
        outcome.study.set_user_attr(SENSITIVITY_ATTR, dict(zip(space.distributions(), sensitivity, strict=True)))
    top, *middle, bottom = ranks_figure(outcome, read_study_view(outcome.study)).axes
    assert len(middle) == told
    for i, (name, part) in enumerate(space.series.items()):
        bars, below = top.containers[i], bottom.containers[i]
        assert bars.get_label() == (name or "recommended")
        assert [bar.get_height() for bar in bars] == [found.ranks[module] for module in space.modules[part]]
        assert [bar.get_height() for bar in below] == pytest.approx([100 * x for x in space.profile[part]])
        for axes in middle:
            shares = [bar.get_height() for bar in axes.containers[i]]
            assert shares == pytest.approx([100 * x / sum(sensitivity) for x in sensitivity[part]])
        assert [bar.get_x() for bar in bars] == [bar.get_x() for bar in below]
        assert all(abs(bar.get_center()[0] - layer) < 0.5 for bar, layer in zip(bars, space.layers, strict=True))
