"""The plotly figures of a study for optuna-dashboard."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_optuna.studies.recommendation import Recommendation
from rankadaptor_optuna.views.study_view import StudyView
from rankadaptor_optuna.views.style import (
    BLACK,
    BLUE,
    GREY,
    NOT_SEARCHED,
    ORANGE,
    PRUNED,
    RECOMMENDED,
    SENSITIVITY,
    SUBLAYERS,
    UNIFORM,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MAX_COLUMNS = 400  # columns of the heat map: the page polls every figure, and a card is some 600 px wide
_PANEL = 0.25  # height of each panel below the ranks, as a share of the figure
_UNIFORM_LINE = {"color": UNIFORM, "dash": "dash"}


def heat_map_figure(view: StudyView) -> Figure:
    """Draws the rank of each layer over the latest 400 finished trials; triangles mark uniform trials.

    With sublayers, the rows of attention are below those of the MLPs.
    """
    from plotly.graph_objects import Heatmap, Scatter

    rows = [i for part in view.series.values() for i in range(len(view.labels))[part]]
    numbers, ranks = view.numbers[-_MAX_COLUMNS:], view.ranks[-_MAX_COLUMNS:, rows]
    values = np.unique(ranks)
    cells = Heatmap(
        x=numbers,
        y=[_as_label(view.labels[i]) for i in rows],
        z=ranks.T.astype(np.min_scalar_type(ranks.max())),  # plotly packs arrays of small integers tightly
        colorscale="Viridis",
        colorbar={"title": "rank", "thickness": 14, "tickvals": values if len(values) <= 12 else None},
        hovertemplate="trial %{x}<br>layer %{y}<br>rank %{z}<extra></extra>",
    )
    figure = _figure([cells], view, "Rank of each layer over trials", "finished trial (number)", "layer")
    # categories: unfinished trials leave no gaps
    figure.update_xaxes(type="category", showgrid=False, nticks=12, range=[-0.5, len(numbers) - 0.5])
    figure.update_yaxes(type="category", showgrid=False, nticks=17, automargin=True)
    figure.update_layout(margin={"b": 55}, showlegend=False)
    marked = np.asarray(numbers)[view.is_uniform[-_MAX_COLUMNS:]]
    if len(marked):
        lane = {"tickvals": [0], "ticktext": ["uniform"], "showgrid": False, "zeroline": False}
        figure.update_layout(yaxis2={"domain": [0.95, 1], "range": [-1, 1], **lane}, yaxis={"domain": [0, 0.94]})
        look = {"symbol": "triangle-down", "size": 9, "color": UNIFORM}
        hover = "trial %{x}: uniform<extra></extra>"
        marks = Scatter(x=marked, y=np.zeros_like(marked), mode="markers", marker=look, hovertemplate=hover)
        figure.add_trace(marks.update(yaxis="y2"))
    return figure


def progress_figure(view: StudyView) -> Figure:
    """Draws the score of each finished trial, the best so far, and the uniform score; needs one objective."""
    from plotly.graph_objects import Scatter

    assert view.scores is not None
    assert view.best is not None
    numbers, worst = np.asarray(view.numbers), _worst_shown(view)
    outside = view.scores > worst if view.minimize else view.scores < worst
    over, uniform = ~outside & ~view.within_budget, ~outside & view.is_uniform
    shown = np.where(outside, worst, view.scores)
    data = []
    for name, which, look in (
        ("trial", ~outside & ~over & ~uniform, {"color": BLUE, "size": 6, "opacity": 0.7}),
        ("over the budget", over, {"color": ORANGE, "size": 7, "symbol": "circle-open"}),
        ("uniform trial", uniform, {"color": UNIFORM, "size": 9, "symbol": "diamond"}),
        ("worse than shown", outside, {"color": GREY, "size": 9, "symbol": "x-thin-open"}),
    ):
        if which.any():
            data.append(Scatter(x=numbers[which], y=shown[which], mode="markers", name=name, marker=look))
    corner = np.r_[True, np.diff(view.best) != 0]  # a step line needs no other points
    x, y = np.r_[numbers[corner], numbers[-1]], np.r_[view.best[corner], view.best[-1]]
    data.append(Scatter(x=x, y=y, mode="lines", name="best so far", line={"color": BLACK, "shape": "hv"}))
    title = "Best so far"
    if view.uniform_score is not None:
        title, n = "Best so far against uniform", int(view.is_uniform.sum())
        name = "uniform" if n == 1 else f"uniform (mean of {n})"
        x, y = [0, max(1, view.numbers[-1])], [view.uniform_score] * 2
        data.append(Scatter(x=x, y=y, mode="lines", name=name, line=_UNIFORM_LINE))
    axis = f"{_as_label(view.objective)} ({'lower' if view.minimize else 'higher'} is better)"
    figure = _figure(data, view, title, "trial (number)", axis)
    return figure.update_xaxes(dtick=1 if view.numbers[-1] <= 5 else None)


def ranks_figure(view: StudyView, found: Recommendation) -> Figure:
    """Draws the recommended rank of each layer and the uniform rank, above the layer's pruned share and sensitivity."""
    from plotly.graph_objects import Bar, Scatter

    panels = [
        (title, shares, color)
        for title, shares, color in (
            ("weights pruned", view.profile, PRUNED),
            ("share of the sensitivity", view.sensitivity, SENSITIVITY),
        )
        if shares is not None
    ]
    not_searched = {module: rank for module, rank in found.all_ranks.items() if module not in found.ranks}
    ranks = [found.params[name] for name in view.names]
    upper: list[Any] = []
    lower: list[Any] = []
    colors = (RECOMMENDED,) if len(view.series) == 1 else SUBLAYERS
    for (name, part), color in zip(view.series.items(), colors, strict=True):
        layers, group, first = _layers(view.labels[part], name), {"offsetgroup": name or None}, not upper
        upper.append(Bar(x=layers, y=ranks[part], name=name or "recommended", marker={"color": color}, **group))
        fixed = {module: rank for module, rank in not_searched.items() if str(module).endswith(name)}
        if fixed:
            look = {"name": "not searched", "marker": {"color": NOT_SEARCHED}, "showlegend": first}
            upper.append(Bar(x=_layers(fixed, name), y=list(fixed.values()), **look, **group))
        for i, (title, shares, alone) in enumerate(panels, 2):
            percent = [round(100 * value, 1) for value in shares[part]]
            look = {"name": title, "marker": {"color": color if name else alone}, "showlegend": False}
            lower.append(Bar(x=layers, y=percent, yaxis=f"y{i}", **look, **group))
    if view.uniform_ranks is not None:
        upper.append(Scatter(x=layers, y=view.uniform_ranks[part], mode="lines", name="uniform", line=_UNIFORM_LINE))
    figure = _figure(upper + lower, view, "Recommended rank of each layer", "layer", "rank")
    barmode = "overlay" if len(view.series) == 1 else "group"
    figure.update_layout(barmode=barmode, bargap=0.15, yaxis={"rangemode": "tozero"})
    figure.update_yaxes(dtick=1 if max(ranks) <= 5 else None)
    for i, (title, *_) in enumerate(panels):
        low, high = i * _PANEL, (i + 0.7) * _PANEL
        figure.update_layout({f"yaxis{i + 2}": {"domain": [low, high], "title": "%", "rangemode": "tozero"}})
        at = {"x": 0, "xanchor": "left", "y": high, "yanchor": "bottom"}
        figure.add_annotation(text=title, xref="paper", yref="paper", showarrow=False, **at)
    if panels:
        figure.update_layout(xaxis={"anchor": "y2"}, yaxis={"domain": [len(panels) * _PANEL, 1]})
    return figure


def _layers(labels: Iterable[Any], sublayer: str) -> list[Any]:
    """Returns the bars' places on the axis of layers."""
    return [int(label.partition(".")[0]) if sublayer else _as_label(label) for label in labels]


def _as_label(label: int | str) -> int | str:
    """Returns a label that plotly, which reads some HTML, shows as it is."""
    return html.escape(label, quote=False) if isinstance(label, str) else label


def _worst_shown(view: StudyView) -> float:
    """Returns the worst score on the axis: a diverged trial must not squash the scale."""
    assert view.scores is not None
    sign = -1 if view.minimize else 1
    scores = sign * view.scores
    low, high = np.quantile(scores, [0.25, 0.75])
    # 3 interquartile ranges: Tukey's outer fence
    limit = low - 3 * (high - low) if high > low else -np.inf
    if view.uniform_score is not None:
        limit = min(limit, sign * view.uniform_score)
    return float(sign * scores[scores >= limit].min())


def _figure(data: list[Any], view: StudyView, title: str, x: str, y: str) -> Figure:
    from plotly.graph_objects import Figure

    counts = ((len(view.numbers), "finished"), (view.n_pruned, "pruned"), (view.n_failed, "failed"))
    trials = " · ".join(f"{n} {state}" for n, state in counts if n)
    figure = Figure(data)
    figure.update_layout(
        template=None,  # the default template is larger than all the rest
        title={"text": title, "subtitle": {"text": f"Trials: {trials}"}, "x": 0.02},
        xaxis={"title": x, "zeroline": False},
        yaxis={"title": y},
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        margin={"l": 65, "r": 20, "t": 70, "b": 95},
    )
    return figure
