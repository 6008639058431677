from __future__ import annotations

import base64
import itertools
import json

import numpy as np
import pytest
from optuna.trial import create_trial

from rankadaptor_optuna import RankSpace, recommend
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.views.figures import heat_map_figure, progress_figure, ranks_figure

pytest.importorskip("plotly")


def decoded(values):
    """A trace's values, which plotly may have packed."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]) if isinstance(values, dict) else values


def traces(figure):
    return {trace.get("name", trace["type"]): trace for trace in figure.to_dict()["data"]}


def test_the_heat_map_has_a_column_per_trial_and_marks_uniform_ones(view_of, make_study, space):
    view = view_of(make_study(5))
    cells, marks = heat_map_figure(view).to_dict()["data"]
    assert tuple(cells["x"]) == view.numbers
    assert tuple(cells["y"]) == space.layers
    assert np.reshape(decoded(cells["z"]), (6, 5)).T.tolist() == view.ranks.tolist()
    assert list(decoded(marks["x"])) == [0]


def test_bars_show_ranks_above_sensitivity_and_pruned_share(view_of, make_study, space):
    study = make_study(3)
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(space.distributions(), [1, 2, -1, 3, 4, 1], strict=True)))
    found = recommend(study)
    figure = ranks_figure(view_of(study), found)
    bars, layout = traces(figure), figure.to_dict()["layout"]
    assert list(bars["recommended"]["y"]) == list(found.ranks.values())
    assert (list(bars["not searched"]["x"]), list(bars["not searched"]["y"])) == ([0, 7], [8, 8])
    assert list(bars["share of the sensitivity"]["y"]) == [10, 20, -10, 30, 40, 10]
    assert list(bars["weights pruned"]["y"]) == [100 * share for share in space.profile]
    assert [bars[name]["yaxis"] for name in ("weights pruned", "share of the sensitivity")] == ["y2", "y3"]
    panels = [layout[axis]["domain"] for axis in ("yaxis2", "yaxis3", "yaxis")]
    assert all(below[1] < above[0] for below, above in itertools.pairwise(panels))


def test_attention_and_mlp_stand_side_by_side_at_their_layer(view_of, make_study, by_sublayer):
    study = make_study(5, by_sublayer)
    view, found = view_of(study), recommend(study)
    drawn = ranks_figure(view, found).to_dict()
    for name, part in by_sublayer.series.items():
        bars = [trace for trace in drawn["data"] if trace.get("offsetgroup") == name]
        assert [bar["name"] for bar in bars] == [name, "not searched", "weights pruned"]
        assert list(bars[0]["x"]) == [*by_sublayer.layers]
        assert list(bars[0]["y"]) == [found.ranks[module] for module in by_sublayer.modules[part]]
        assert (list(bars[1]["x"]), list(bars[1]["y"])) == ([0, 7], [8, 8])
        assert list(bars[2]["y"]) == [100 * share for share in by_sublayer.profile[part]]
    assert drawn["layout"]["barmode"] == "group"
    cells = heat_map_figure(view).to_dict()["data"][0]
    assert tuple(cells["y"]) == (*by_sublayer.modules[::2], *by_sublayer.modules[1::2])
    assert np.reshape(decoded(cells["z"]), (12, 5))[6:].T.tolist() == view.ranks[:, 1::2].tolist()


def test_a_drop_in_study_has_no_uniform_line(view_of, drop_in):
    study = drop_in()
    view = view_of(study)
    assert traces(ranks_figure(view, recommend(study))).keys() == {"recommended"}
    assert "uniform" not in traces(progress_figure(view))


def test_trials_over_the_budget_and_diverged_ones_are_marked_and_do_not_squash_the_scale(view_of, make_study, space):
    study = make_study(8)
    for rank, value in ((12, 0.5), (4, -1e6)):
        params = dict.fromkeys(space.distributions(), rank)
        study.add_trial(create_trial(params=params, distributions=space.distributions(), value=value))
    drawn = traces(progress_figure(view_of(study)))
    assert list(decoded(drawn["over the budget"]["x"])) == [8]
    assert list(decoded(drawn["worse than shown"]["x"])) == [9]
    assert min(min(decoded(trace["y"])) for trace in drawn.values()) > -10


def test_figures_stay_small_in_a_long_study(view_of, make_study):
    space = RankSpace(32, budget="uniform:8")
    rng = np.random.default_rng(0)
    study = make_study(0, space)
    for value in rng.normal(size=600):
        ranks = dict(zip(space.distributions(), rng.choice(space.candidates, 32).tolist(), strict=True))
        study.add_trial(create_trial(params=ranks, distributions=space.distributions(), value=float(value)))
    view = view_of(study)
    figures = [heat_map_figure(view), progress_figure(view), ranks_figure(view, recommend(study))]
    assert sum(len(json.dumps(json.loads(figure.to_json()))) for figure in figures) < 50_000
