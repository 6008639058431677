from __future__ import annotations

import pytest

from rankadaptor_optuna import recommend
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.views.pictures import draw_progress, draw_ranks

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "sublayer"])
def test_ranks_stand_above_their_layers_sensitivity_and_pruned_share(
    view_of, make_study, space, by_sublayer, granularity, measured
):
    space = space if granularity == "layer" else by_sublayer
    study = make_study(4, space)
    sensitivity = [0.5 + i for i in range(len(space.modules))]
    if measured:
        study.set_user_attr(SENSITIVITY_ATTR, dict(zip(space.distributions(), sensitivity, strict=True)))
    found = recommend(study)
    top, *middle, bottom = draw_ranks(space, found, view_of(study)).axes
    assert len(middle) == measured
    for i, (name, part) in enumerate(space.series.items()):
        bars, below = top.containers[i], bottom.containers[i]
        assert bars.get_label() == (name or "recommended")
        assert [bar.get_height() for bar in bars] == [found.ranks[module] for module in space.modules[part]]
        assert [bar.get_height() for bar in below] == pytest.approx([100 * share for share in space.profile[part]])
        for axes in middle:
            shares = [bar.get_height() for bar in axes.containers[i]]
            assert shares == pytest.approx([100 * x / sum(sensitivity) for x in sensitivity[part]])
        assert [bar.get_x() for bar in bars] == [bar.get_x() for bar in below]
        assert all(abs(bar.get_center()[0] - layer) < 0.5 for bar, layer in zip(bars, space.layers, strict=True))
    assert [bar.get_height() for bar in top.containers[-1]] == list(space.fixed_ranks.values())


def test_progress_shows_trials_the_best_so_far_and_uniform(view_of, make_study):
    view = view_of(make_study(5))
    trials, best, uniform = draw_progress(view).axes[0].lines
    assert trials.get_ydata().tolist() == view.scores.tolist()
    assert best.get_ydata().tolist() == view.best.tolist()
    assert set(uniform.get_ydata()) == {view.uniform_score}
