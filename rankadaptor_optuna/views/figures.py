"""A study read for plots and reports, and its plots for optuna-dashboard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from rankadaptor_optuna.attributes import CONVERGED_ATTR, SENSITIVITY_ATTR
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.sampling.history import verification_seed
from rankadaptor_optuna.studies.reading import finished_trials, study_ranks, study_space, uniform_trials
from rankadaptor_optuna.studies.recommendation import Recommendation

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MAX_COLUMNS = 400  # of the heat map: the page polls every figure, and a card is some 600 px wide
_BLUE, _VERMILION, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"  # Okabe-Ito
_GREY, _BLACK = "#999999", "#000000"
_DASHED = {"color": _VERMILION, "dash": "dash"}
_PANEL = 0.25  # of the height, for each thing known of the layers


@dataclass(frozen=True)
class History:
    """What plots and reports of a study need: n finished trials in order, L rank parameters in depth order.

    Attributes:
        numbers: Trial numbers, (n,).
        ranks: Ranks of each trial, (n, L).
        names: Names of the rank parameters, (L,).
        labels: Layer indices (or sublayers, ``"3.mlp"``), (L,); the parameters' names where no space is known and
            several of them belong to one layer.
        series: Ranks along the depth: which of the L are of each sublayer, of the layers (``""``) where there is one.
        is_uniform: Which trials are the uniform configuration, (n,); all False where no space is known.
        within_budget: Which trials keep to the budget, (n,); all of them where there is none.
        scores: Score of each trial, (n,); None with several objectives.
        best: Best score so far within the budget, (n,), NaN before the first; None with several objectives.
        uniform_score: Mean score of the uniform trials; None without any.
        uniform_ranks: Ranks of the uniform configuration, (L,); None where no space is known.
        profile: Share of each layer's weights that pruning took, (L,); None where unknown.
        sensitivity: Each layer's share of how sensitive the score is to all layers' adapters, (L,); None where unknown.
        objective: The metric's name, ``"score"`` where it has none.
        minimize: Whether lower scores are better.
        n_pruned: Pruned trials.
        n_failed: Failed trials.
        converged: What ``StopWhenConverged`` said; None where it did not stop the study.
    """

    numbers: tuple[int, ...]
    ranks: NDArray[np.int64]
    names: tuple[str, ...]
    labels: tuple[int, ...] | tuple[str, ...]
    series: dict[str, slice]
    is_uniform: NDArray[np.bool_]
    within_budget: NDArray[np.bool_]
    scores: NDArray[np.float64] | None
    best: NDArray[np.float64] | None
    uniform_score: float | None
    uniform_ranks: tuple[int, ...] | None
    profile: tuple[float, ...] | None
    sensitivity: tuple[float, ...] | None
    objective: str
    minimize: bool
    n_pruned: int
    n_failed: int
    converged: str | None


def history(study: Study) -> History:
    """Reads a study for plots and reports, but for its verification trials; needs no plotly nor optuna-dashboard."""
    space = study_space(study)
    names = study_ranks(study, space)
    trials = finished_trials(study)
    uniform = {t.number for t in uniform_trials(study)}
    is_uniform = np.asarray([t.number in uniform for t in trials], dtype=bool)
    minimize = study.directions[0] is StudyDirection.MINIMIZE
    ranks = np.asarray([[t.params[name] for name in names] for t in trials], dtype=np.int64)
    ranks = ranks.reshape(len(trials), len(names))
    within_budget = np.ones(len(trials), dtype=bool)
    if space is not None and space.budget is not None:  # another sampler may exceed it
        costs = [space.cost(Ranks(zip(space.modules, row, strict=True))) for row in ranks.tolist()]
        within_budget = np.asarray([space.is_within_budget(cost) for cost in costs])
    scores = best = None
    if len(study.directions) == 1:
        scores = np.asarray([t.value for t in trials], dtype=np.float64)
        better = np.fmin if minimize else np.fmax  # these skip NaN
        best = better.accumulate(np.where(within_budget, scores, np.nan))
    told = study.user_attrs.get(SENSITIVITY_ATTR, {})
    sensitivity = [told.get(name, np.nan) for name in names]
    whole = sum(sensitivity)
    states = [t.state for t in study.get_trials(deepcopy=False) if verification_seed(t) is None]
    return History(
        numbers=tuple(t.number for t in trials),
        ranks=ranks,
        names=tuple(names),
        labels=tuple(names.values()) if len(set(names.values())) == len(names) else tuple(names),
        series={"": slice(None)} if space is None else space.series,
        is_uniform=is_uniform,
        within_budget=within_budget,
        scores=scores,
        best=best,
        uniform_score=float(scores[is_uniform].mean()) if scores is not None and is_uniform.any() else None,
        uniform_ranks=None if space is None else tuple(space.uniform().values()),
        profile=space.profile if space is not None and any(space.profile) else None,
        sensitivity=tuple(value / whole for value in sensitivity) if whole > 0 else None,
        objective=(study.metric_names or ["score"])[0],
        minimize=minimize,
        n_pruned=states.count(TrialState.PRUNED),
        n_failed=states.count(TrialState.FAIL),
        converged=study.user_attrs.get(CONVERGED_ATTR),
    )


def heat_map_figure(h: History) -> Figure:
    """Rank of each layer over the finished trials (the latest 400); marks above show the uniform ones.

    Of sublayers, the attention's ranks are below and the MLP's above.
    """
    from plotly.graph_objects import Heatmap, Scatter

    rows = [i for part in h.series.values() for i in range(len(h.labels))[part]]
    numbers, ranks = h.numbers[-_MAX_COLUMNS:], h.ranks[-_MAX_COLUMNS:, rows]
    values = np.unique(ranks)
    cells = Heatmap(
        x=numbers,
        y=[h.labels[i] for i in rows],
        z=ranks.T.astype(np.min_scalar_type(ranks.max())),  # plotly packs arrays of small integers tightly
        colorscale="Viridis",
        colorbar={"title": "rank", "thickness": 14, "tickvals": values if len(values) <= 12 else None},
        hovertemplate="trial %{x}<br>layer %{y}<br>rank %{z}<extra></extra>",
    )
    figure = _figure([cells], h, "Rank of each layer over trials", "finished trial (number)", "layer")
    # categories: unfinished trials leave no gaps
    figure.update_xaxes(type="category", showgrid=False, nticks=12, range=[-0.5, len(numbers) - 0.5])
    figure.update_yaxes(type="category", showgrid=False, nticks=17, automargin=True)
    figure.update_layout(margin={"b": 55}, showlegend=False)
    marked = np.asarray(numbers)[h.is_uniform[-_MAX_COLUMNS:]]
    if len(marked):
        lane = {"tickvals": [0], "ticktext": ["uniform"], "showgrid": False, "zeroline": False}
        figure.update_layout(yaxis2={"domain": [0.95, 1], "range": [-1, 1], **lane})
        figure.update_layout(yaxis={"domain": [0, 0.94]})
        look = {"symbol": "triangle-down", "size": 9, "color": _VERMILION}
        hover = "trial %{x}: uniform<extra></extra>"
        marks = Scatter(x=marked, y=np.zeros_like(marked), mode="markers", marker=look, hovertemplate=hover)
        figure.add_trace(marks.update(yaxis="y2"))
    return figure


def history_figure(h: History) -> Figure:
    """Score of each finished trial, the best so far, and the uniform reference; needs one objective."""
    from plotly.graph_objects import Scatter

    assert h.scores is not None
    assert h.best is not None
    numbers, worst = np.asarray(h.numbers), _worst_shown(h)
    outside = h.scores > worst if h.minimize else h.scores < worst
    over, uniform = ~outside & ~h.within_budget, ~outside & h.is_uniform
    shown = np.where(outside, worst, h.scores)
    data = []
    for name, which, look in (
        ("trial", ~outside & ~over & ~uniform, {"color": _BLUE, "size": 6, "opacity": 0.7}),
        ("over the budget", over, {"color": _ORANGE, "size": 7, "symbol": "circle-open"}),
        ("uniform trial", uniform, {"color": _VERMILION, "size": 9, "symbol": "diamond"}),
        ("worse than shown", outside, {"color": _GREY, "size": 9, "symbol": "x-thin-open"}),
    ):
        if which.any():
            data.append(Scatter(x=numbers[which], y=shown[which], mode="markers", name=name, marker=look))
    corner = np.r_[True, np.diff(h.best) != 0]  # all that the line needs
    x, y = np.r_[numbers[corner], numbers[-1]], np.r_[h.best[corner], h.best[-1]]
    data.append(Scatter(x=x, y=y, mode="lines", name="best so far", line={"color": _BLACK, "shape": "hv"}))
    title = "Best so far"
    if h.uniform_score is not None:
        title, n = "Best so far against uniform", int(h.is_uniform.sum())
        name = "uniform" if n == 1 else f"uniform (mean of {n})"
        x, y = [0, max(1, h.numbers[-1])], [h.uniform_score] * 2
        data.append(Scatter(x=x, y=y, mode="lines", name=name, line=_DASHED))
    axis = f"{h.objective} ({'lower' if h.minimize else 'higher'} is better)"
    figure = _figure(data, h, title, "trial (number)", axis)
    return figure.update_xaxes(dtick=1 if h.numbers[-1] <= 5 else None)


def ranks_figure(h: History, found: Recommendation) -> Figure:
    """Recommended rank of each layer with the uniform rank, above what is known of the layer."""
    from plotly.graph_objects import Bar, Scatter

    told = (("weights pruned", h.profile, _ORANGE), ("share of the sensitivity", h.sensitivity, _PURPLE))
    known = [(what, shares, color) for what, shares, color in told if shares is not None]
    whole = {module: rank for module, rank in found.all_ranks.items() if module not in found.ranks}
    ranks = [found.params[name] for name in h.names]
    upper: list[Any] = []
    lower: list[Any] = []
    for (name, part), color in zip(h.series.items(), (_BLUE, _GREEN), strict=False):
        layers, group, first = _layers(h.labels[part], name), {"offsetgroup": name or None}, not upper
        upper.append(Bar(x=layers, y=ranks[part], name=name or "recommended", marker={"color": color}, **group))
        fixed = {module: rank for module, rank in whole.items() if str(module).endswith(name)}
        if fixed:
            look = {"name": "not searched", "marker": {"color": _GREY}, "showlegend": first}
            upper.append(Bar(x=_layers(fixed, name), y=list(fixed.values()), **look, **group))
        for i, (what, shares, alone) in enumerate(known, 2):
            share = [round(100 * value, 1) for value in shares[part]]
            look = {"name": what, "marker": {"color": color if name else alone}, "showlegend": False}
            lower.append(Bar(x=layers, y=share, yaxis=f"y{i}", **look, **group))
    if h.uniform_ranks is not None:
        upper.append(Scatter(x=layers, y=h.uniform_ranks[part], mode="lines", name="uniform", line=_DASHED))
    figure = _figure(upper + lower, h, "Recommended rank of each layer", "layer", "rank")
    barmode = "overlay" if len(h.series) == 1 else "group"
    figure.update_layout(barmode=barmode, bargap=0.15, yaxis={"rangemode": "tozero"})
    figure.update_yaxes(dtick=1 if max(ranks) <= 5 else None)
    for i, (what, *_) in enumerate(known):
        low, high = i * _PANEL, (i + 0.7) * _PANEL
        figure.update_layout({f"yaxis{i + 2}": {"domain": [low, high], "title": "%", "rangemode": "tozero"}})
        at = {"x": 0, "xanchor": "left", "y": high, "yanchor": "bottom"}
        figure.add_annotation(text=what, xref="paper", yref="paper", showarrow=False, **at)
    if known:
        figure.update_layout(xaxis={"anchor": "y2"}, yaxis={"domain": [len(known) * _PANEL, 1]})
    return figure


def _layers(labels: Iterable[Any], sublayer: str) -> list[Any]:
    """Where on the layers' axis the bars of a series stand."""
    return [int(label.partition(".")[0]) if sublayer else label for label in labels]


def _worst_shown(h: History) -> float:
    """Worst score on the history plot's axis: a diverged trial must not squash the scale."""
    assert h.scores is not None
    sign = -1 if h.minimize else 1
    scores = sign * h.scores
    low, high = np.quantile(scores, [0.25, 0.75])
    limit = low - 3 * (high - low) if high > low else -np.inf
    if h.uniform_score is not None:
        limit = min(limit, sign * h.uniform_score)
    return float(sign * scores[scores >= limit].min())


def _figure(data: list[Any], h: History, title: str, x: str, y: str) -> Figure:
    from plotly.graph_objects import Figure

    counts = ((len(h.numbers), "finished"), (h.n_pruned, "pruned"), (h.n_failed, "failed"))
    trials = " · ".join(f"{n} {state}" for n, state in counts if n)
    figure = Figure(data)
    figure.update_layout(
        template=None,  # the default one is larger than all the rest
        title={"text": title, "subtitle": {"text": f"Trials: {trials}"}, "x": 0.02},
        xaxis={"title": x, "zeroline": False},
        yaxis={"title": y},
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        margin={"l": 65, "r": 20, "t": 70, "b": 95},
    )
    return figure
