"""The matplotlib pictures of a study and of a comparison, for reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_optuna.jobs.results import OURS, UNTRAINED, Comparison
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.recommendation import Recommendation
from rankadaptor_optuna.views.study_view import StudyView
from rankadaptor_optuna.views.style import (
    BLACK,
    BLUE,
    GREY,
    NOT_SEARCHED,
    PRUNED,
    RECOMMENDED,
    SENSITIVITY,
    SUBLAYERS,
    UNIFORM,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEGEND = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "frameon": False}


def draw_ranks(space: RankSpace, found: Recommendation, view: StudyView) -> Figure:
    """Draws the recommended rank of each layer, above its sensitivity and the share of its weights that pruning took.

    Sublayers stand side by side at their layer.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ranks = list(found.ranks.values())
    panels = {}
    if view.sensitivity is not None:
        panels["sensitivity\n(% of all layers')"] = (view.sensitivity, SENSITIVITY)
    panels["weights pruned\n(%)"] = (view.profile or (0.0,) * len(space.modules), PRUNED)
    figure = Figure(figsize=(9, 3 + 2 * len(panels)), layout="constrained")
    top, *lower = figure.subplots(1 + len(panels), 1, sharex=True, height_ratios=(3, *(2 for _ in panels)))
    width = 0.8 / len(space.series)
    for i, (name, part) in enumerate(space.series.items()):
        at = np.asarray(space.layers) + width * (i - (len(space.series) - 1) / 2)
        top.bar(at, ranks[part], width, color=SUBLAYERS[i] if name else RECOMMENDED, label=name or "recommended")
        for axes, (shares, color) in zip(lower, panels.values(), strict=True):
            axes.bar(at, 100 * np.asarray(shares)[part], width, color=SUBLAYERS[i] if name else color)
    if space.fixed_ranks:
        layers, fixed = list(space.fixed_ranks), list(space.fixed_ranks.values())
        top.bar(layers, fixed, color=NOT_SEARCHED, label="not searched")
    uniform = next(iter(space.uniform().values()))
    top.axhline(uniform, color=UNIFORM, linestyle="--", label=f"uniform, rank {uniform}")
    top.set_ylabel("LoRA rank")
    top.set_yticks(space.candidates)
    top.legend(**_LEGEND)
    for axes, label in zip(lower, panels, strict=True):
        axes.set_ylabel(label)
    lower[-1].set_xlabel("layer")
    lower[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    lower[-1].set_xlim(-1, space.n_layers)
    return figure


def draw_progress(view: StudyView) -> Figure:
    """Draws the score of each finished trial, the best so far, and the uniform score."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    if view.scores is not None and view.best is not None:
        axes.plot(view.numbers, view.scores, "o", color=BLUE, label="trial")
        axes.step(view.numbers, view.best, where="post", color=BLACK, label="best so far")
    if view.uniform_score is not None:
        axes.axhline(view.uniform_score, color=UNIFORM, linestyle="--", label="uniform")
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{view.objective}, {'lower' if view.minimize else 'higher'} is better", parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(**_LEGEND)
    return figure


def draw_comparison(comparison: Comparison) -> Figure:
    """Draws the perplexity of each recovery by fresh seed, and the mean."""
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows if row.method not in UNTRAINED]
    figure = Figure(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        perplexities = [math.exp(loss) for loss in row.losses]
        color = RECOMMENDED if row.method == OURS else GREY
        axes.plot(perplexities, [at] * len(perplexities), "o", color=color, label="_" if at else "seed")
        axes.plot([np.mean(perplexities)], [at], "|", markersize=14, color=BLACK, label="_" if at else "mean")
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"perplexity on the report data, {len(comparison.seeds)} fresh seeds (lower is better)")
    axes.legend(**_LEGEND)
    return figure
