"""A study in optuna-dashboard: ranks over trials, progress against uniform, and a note that recommends."""

from __future__ import annotations

import os
import re
import socket
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from rankadaptor_optuna.convergence import CONVERGED_ATTR
from rankadaptor_optuna.history import verification_seed
from rankadaptor_optuna.recommendation import Recommendation, recommend
from rankadaptor_optuna.recovery.lora import ALPHA_RATIO, TARGETS
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.study import (
    finished_trials,
    masked,
    open_storage,
    study_ranks,
    study_space,
    uniform_trials,
)
from rankadaptor_optuna.surrogate.prior import Prior

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HEAT_MAP_ID = "rankadaptor-1-ranks-over-trials"
HISTORY_ID = "rankadaptor-2-best-so-far"
RANKS_ID = "rankadaptor-3-recommended-ranks"
_BEGIN = "[//]: # (rankadaptor: written anew by each publish_dashboard; your own text goes above or below)"
_END = "[//]: # (rankadaptor: end)"
_MAX_COLUMNS = 400  # of the heat map: the page polls every figure, and a card is some 600 px wide
_BLUE, _VERMILION, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#E69F00", "#009E73"  # Okabe-Ito
_GREY, _BLACK = "#999999", "#000000"
_DASHED = {"color": _VERMILION, "dash": "dash"}


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
        costs = [space.cost(dict(zip(space.modules, row, strict=True))) for row in ranks.tolist()]
        within_budget = np.asarray(costs) <= space.budget
    scores = best = None
    if len(study.directions) == 1:
        scores = np.asarray([t.value for t in trials], dtype=np.float64)
        better = np.fmin if minimize else np.fmax  # these skip NaN
        best = better.accumulate(np.where(within_budget, scores, np.nan))
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
        objective=(study.metric_names or ["score"])[0],
        minimize=minimize,
        n_pruned=states.count(TrialState.PRUNED),
        n_failed=states.count(TrialState.FAIL),
        converged=study.user_attrs.get(CONVERGED_ATTR),
    )


def publish_dashboard(study: Study, *, prior: Prior | str | os.PathLike[str] | None = "pretrained") -> None:
    """Publishes plots and a note with the recommendation to the study, where optuna-dashboard shows them.

    Each call replaces the plots, and of the note what lies between two (invisible) markers: the rest stays.
    Publish a study from one process at a time; two at once may leave a plot unreadable until the next call.

    Args:
        study: A study in any storage; any sampler may have made its trials. Without finished trials the note
            says so and there are no plots; with several objectives there is no recommendation.
        prior: See ``recommend``.

    Raises:
        ImportError: The extra ``dashboard`` is not installed.
        ValueError: The study's finished trials have no rank parameters.
    """
    _require_extra()
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    h = history(study)
    if h.numbers and not h.names:
        raise ValueError("the study has no rank parameters: names with a layer number and integer values.")
    found = recommend(study, prior=prior) if h.numbers and h.scores is not None else None
    figures = {}
    if h.numbers:
        figures[HEAT_MAP_ID] = heat_map_figure(h)
    if found is not None:
        figures |= {HISTORY_ID: history_figure(h), RANKS_ID: ranks_figure(h, found)}
    for name, figure in figures.items():
        save_plotly_graph_object(study, figure, graph_object_id=name)
    old = get_note(study)
    new = _merged(old, note(h, found, study_space(study)))
    if new != old:
        save_note(study, new)


def serve(
    storage_url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    artifact_dir: str | Path | None = None,
    prior: Prior | str | os.PathLike[str] | None = "pretrained",
) -> None:
    """Publishes every study with rank parameters in a database, then runs optuna-dashboard until interrupted.

    The server asks for no password: whoever reaches ``host`` can read and change the studies.

    Args:
        storage_url: The database; its tables are created where they are missing.
        host: Address to listen on. Default: this machine only.
        port: Port to listen on; 0 takes any free one.
        artifact_dir: Folder of the studies' artifacts, created where it is missing. Default: no artifacts.
        prior: See ``recommend``.

    Raises:
        ImportError: The extra ``dashboard`` is not installed.
        ValueError: The database cannot be opened, or the address cannot be listened on.
    """
    _require_extra()
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    storage = open_storage(storage_url)
    with _listening(host, port) as server:
        for name in optuna.get_all_study_names(storage):
            try:
                study = optuna.load_study(study_name=name, storage=storage)
                if study_ranks(study):
                    publish_dashboard(study, prior=prior)
            except Exception as error:  # one odd study must not hide the others
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: study {name!r} is not published: {reason:.300}", file=sys.stderr, flush=True)
        if artifact_dir is not None:
            os.makedirs(artifact_dir, exist_ok=True)
        artifacts = None if artifact_dir is None else FileSystemArtifactStore(artifact_dir)
        server.set_app(wsgi(storage, artifact_store=artifacts))
        shown = f"[{host}]" if ":" in host else host
        print(f"{masked(storage_url)} at http://{shown}:{server.server_port}/ (Ctrl-C to quit)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # threads: a browser's idle connection would block the next request

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """Says nothing: the page polls every few seconds."""


def _listening(host: str, port: int) -> WSGIServer:
    try:
        return _Server(host, port)
    except (OSError, OverflowError) as error:
        hint = "Stop what uses it, or choose another port (0 takes any free one)."
        raise ValueError(f"cannot listen on port {port} of {host}: {error}. {hint}") from None


def _require_extra() -> None:
    try:
        import optuna_dashboard  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        hint = "the dashboard needs optuna-dashboard and plotly: pip install 'rankadaptor-optuna[dashboard]'"
        raise ImportError(f"{hint} ({error})") from None


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
    """Recommended rank of each layer with the uniform rank, above what pruning took from the layer."""
    from plotly.graph_objects import Bar, Scatter

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
        if h.profile is not None:
            share = [round(100 * taken, 1) for taken in h.profile[part]]
            look = {"name": "weights pruned", "marker": {"color": color if name else _ORANGE}, "showlegend": not name}
            lower.append(Bar(x=layers, y=share, yaxis="y2", **look, **group))
    if h.uniform_ranks is not None:
        upper.append(Scatter(x=layers, y=h.uniform_ranks[part], mode="lines", name="uniform", line=_DASHED))
    figure = _figure(upper + lower, h, "Recommended rank of each layer", "layer", "rank")
    barmode = "overlay" if len(h.series) == 1 else "group"
    figure.update_layout(barmode=barmode, bargap=0.15, yaxis={"rangemode": "tozero"})
    figure.update_yaxes(dtick=1 if max(ranks) <= 5 else None)
    if lower:
        axis = {"domain": [0, 0.28], "title": "weights<br>pruned (%)", "rangemode": "tozero"}
        figure.update_layout(xaxis={"anchor": "y2"}, yaxis={"domain": [0.38, 1]}, yaxis2=axis)
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


def note(h: History, found: Recommendation | None, space: RankSpace | None) -> str:
    """The recommendation in GitHub-flavoured Markdown; ``found`` is None where there can be none."""
    if h.scores is None:
        return "## Recommended ranks\n\nA recommendation needs one objective; this study has several."
    if found is None:
        return "## Recommended ranks\n\nNo recommendation yet: the study has no finished trial."
    closest = "; ".join(f"trial {n}, ranks that differ {d}, {y:.5g}" for n, d, y in found.evidence.closest)
    lines = ["## Recommended ranks", "", f"**{found.evidence.statement}**", ""]
    lines += [f"* Predicted {h.objective}: {found.predicted:.5g} ± {found.std:.2g} (one standard deviation)."]
    if h.uniform_score is not None:
        lines += [f"* Uniform configuration: {h.uniform_score:.5g} (trials: {h.is_uniform.sum()})."]
    if h.best is not None and np.isfinite(h.best[-1]):
        number = h.numbers[np.flatnonzero(h.within_budget & (h.scores == h.best[-1]))[0]]
        lines += [f"* Best single trial, noise included: {h.best[-1]:.5g} (trial {number})."]
    lines += [f"* {_cost_text(found, space)}.", f"* Closest finished trials: {closest}.", ""]
    lines += [h.converged, ""] if h.converged else []
    lines += [*_table(h, found), ""]
    if any(found.all_ranks.values()):
        lines += ["Ready to paste, with `target_modules` as in your training:", "", *_code(found)]
    return "\n".join(lines)


def _cost_text(found: Recommendation, space: RankSpace | None) -> str:
    of_ranks = space is None or set(space.costs) == {1.0}
    text = f"{'Sum of ranks' if of_ranks else 'Trainable parameters'}: {found.cost:,.0f}"
    if space is None or space.budget is None:
        return f"{text}, no budget"
    return f"{text} of {space.budget:,.0f} in the budget ({found.cost / space.budget:.1%})"


def _table(h: History, found: Recommendation) -> list[str]:
    kind = "layer" if "" in h.series else "sublayer"
    columns: dict[str, list[str]] = {
        kind: [str(label) for label in h.labels],
        "rank": [str(found.params[name]) for name in h.names],
    }
    if h.uniform_ranks is not None:
        columns["uniform"] = [str(rank) for rank in h.uniform_ranks]
    if h.profile is not None:
        columns["weights pruned"] = [f"{taken:.1%}" for taken in h.profile]
    rows = [list(columns), ["---:"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    fixed = [f"{module} (rank {rank})" for module, rank in found.all_ranks.items() if module not in found.ranks]
    return table + (["", f"Not searched: {kind}s {', '.join(fixed)}."] if fixed else [])


def _code(found: Recommendation) -> list[str]:
    ranks = {module: rank for module, rank in found.all_ranks.items() if rank > 0}
    where = 'layers_to_transform=list(ranks),\n    layers_pattern="layers"'
    if any(isinstance(module, str) for module in ranks):
        ranks = {re.escape(module): rank for module, rank in ranks.items()}
        where = r'''exclude_modules=rf"(.*\.)?layers\.(?!({'|'.join(ranks)})\.).*"'''
    code = rf"""from peft import LoraConfig

ranks = {str(ranks).replace(": ", ":")}
config = LoraConfig(
    r=max(ranks.values()),
    lora_alpha={ALPHA_RATIO:g} * max(ranks.values()),
    rank_pattern={{rf"layers\.{{i}}\..*": r for i, r in ranks.items()}},
    alpha_pattern={{rf"layers\.{{i}}\..*": {ALPHA_RATIO:g} * r for i, r in ranks.items()}},
    {where},
    target_modules={list(TARGETS)},
    task_type="CAUSAL_LM",
)"""
    # broken after commas: the note does not wrap code, it grows wider than the page
    lines = (textwrap.wrap(line, 88, subsequent_indent=" " * 8) for line in code.splitlines())
    return ["```python", *(part for wrapped in lines for part in wrapped or [""]), "```"]


def _merged(old: str, ours: str) -> str:
    """The study's note with our part exchanged, or appended; everything else as it was."""
    block = f"{_BEGIN}\n\n{ours}\n\n{_END}"
    before, begin, rest = old.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + block + after
    return f"{old.rstrip()}\n\n{block}\n" if old.strip() else f"{block}\n"
