"""What a quickstart found, as a table, Markdown and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.jobs.quickstart import N_REPORT_SEEDS, Outcome
from rankadaptor_optuna.surrogate.statistics import t_interval
from rankadaptor_optuna.views.dashboard import publish_dashboard
from rankadaptor_optuna.views.study_view import StudyView, read_study_view
from rankadaptor_optuna.views.tables import as_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _LIGHT, _ORANGE, _GREEN, _GREY = "#0072B2", "#A9CCE3", "#E69F00", "#009E73", "#8C8C8C"


def paired_difference(outcome: Outcome) -> tuple[float, float, float]:
    """Loss of recommended minus uniform over the fresh seeds: mean and 95% t interval; negative is better."""
    differences = np.asarray(outcome.recommended["losses"]) - np.asarray(outcome.uniform["losses"])
    return float(differences.mean()), *t_interval(differences)


def verdict(outcome: Outcome) -> str:
    """Whether the recommendation beat uniform, in one honest sentence."""
    if outcome.recommendation.ranks == outcome.space.uniform():
        return "The search recommends the uniform configuration itself: it found nothing that it expects to be better."
    difference = paired_difference(outcome)
    mean, low, high = (f"{100 * math.expm1(x):+.2f}%" for x in difference)
    change = f"perplexity {mean} (95% interval {low} to {high})"
    where = f"on {N_REPORT_SEEDS} fresh seeds and text that the search did not use"
    if difference[2] < 0:
        return f"The recommendation beat uniform {where}: {change}."
    if difference[1] > 0:
        return f"The recommendation did NOT beat uniform {where}, it was worse: {change}."
    return f"No difference from uniform was shown {where}: {change}."


def table(outcome: Outcome) -> list[list[str]]:
    """Header and four rows: dense, pruned, uniform, recommended."""
    rank = next(iter(outcome.space.uniform().values()))
    rows = [["model", "held-out perplexity", "continuation accuracy", "parameters", "trainable parameters"]]
    for name, found in (("dense", outcome.dense), ("pruned, no recovery", outcome.pruned)):
        rows.append(
            [
                name,
                f"{math.exp(found['loss']):.2f}",
                _accuracy(found["accuracy"]),
                _count(found["parameters"]),
                "-",
            ]
        )
    for name, found in (
        (f"uniform LoRA, rank {rank}", outcome.uniform),
        ("recommended ranks", outcome.recommended),
    ):
        perplexities = np.exp(found["losses"])
        spread = f"{perplexities.mean():.2f} ({perplexities.min():.2f} to {perplexities.max():.2f})"
        trainable = found["parameters"]
        total = _count(outcome.pruned["parameters"] + trainable)
        rows.append([name, spread, _accuracy(found["accuracy"]), total, f"{trainable:,}"])
    return rows


def _accuracy(found: list[float]) -> str:
    return f"{100 * found[0]:.1f}% ± {100 * found[1]:.1f}"


def _count(n: int) -> str:
    return f"{n / 1e6:.1f}M"


def ranks_figure(outcome: Outcome, h: StudyView) -> Figure:
    """Recommended rank of each layer (or sublayers side by side), above its sensitivity and what pruning took."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    space, fixed = outcome.space, outcome.space.fixed_ranks
    ranks, below = list(outcome.recommendation.ranks.values()), {}
    if h.sensitivity is not None:
        below["sensitivity\n(% of all layers')"] = np.asarray(h.sensitivity)
    below["pruned away\n(% of weights)"] = np.asarray(h.profile or (0.0,) * len(space.modules))
    uniform = next(iter(space.uniform().values()))
    figure = Figure(figsize=(9, 3 + 2 * len(below)), layout="constrained")
    top, *others = figure.subplots(1 + len(below), 1, sharex=True, height_ratios=(3, *(2 for _ in below)))
    width = 0.8 / len(space.series)
    for i, (name, part) in enumerate(space.series.items()):
        at = np.asarray(space.layers) + width * (i - (len(space.series) - 1) / 2)
        top.bar(at, ranks[part], width, color=(_BLUE, _GREEN)[i], label=name or "recommended")
        for axes, shares in zip(others, below.values(), strict=True):
            axes.bar(at, 100 * shares[part], width, color=(_BLUE, _GREEN)[i] if name else _GREY)
    if fixed:
        top.bar(list(fixed), list(fixed.values()), color=_LIGHT, label="not pruned, not searched")
    top.axhline(uniform, color=_ORANGE, linestyle="--", label=f"uniform, rank {uniform}")
    top.set_ylabel("LoRA rank")
    top.set_yticks(space.candidates)
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    for axes, label in zip(others, below, strict=True):
        axes.set_ylabel(label)
    others[-1].set_xlabel("layer")
    others[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    others[-1].set_xlim(-1, space.n_layers)
    return figure


def progress_figure(h: StudyView) -> Figure:
    """Every trial's score and the best so far, against the uniform configuration."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    if h.scores is not None and h.best is not None:
        axes.plot(h.numbers, h.scores, "o", color=_GREY, label="trial")
        axes.step(h.numbers, h.best, where="post", color=_BLUE, label="best so far")
    if h.uniform_score is not None:
        axes.axhline(h.uniform_score, color=_ORANGE, linestyle="--", label="uniform")
    axes.set_xlabel("trial")
    axes.set_ylabel(h.objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return figure


def write_report(outcome: Outcome, out: Path) -> None:
    """Writes ``report.md``, ``ranks.png`` and ``progress.png``, and publishes the study for optuna-dashboard."""
    h = read_study_view(outcome.study)
    ranks_figure(outcome, h).savefig(out / "ranks.png", dpi=120)
    progress_figure(h).savefig(out / "progress.png", dpi=120)
    publish_dashboard(outcome.study)
    found = outcome.recommendation
    evidence = found.evidence
    closest = [f"trial {n} ({d} ranks differ, score {score:.4f})" for n, d, score in evidence.closest]
    layers, ranks = [str(layer) for layer in outcome.space.layers], [str(rank) for rank in found.ranks.values()]
    columns = [["layer", *layers], *([name or "rank", *ranks[part]] for name, part in outcome.space.series.items())]
    kept = ", ".join(str(layer) for layer in outcome.space.fixed_ranks)
    fixed = f" Pruning left layers {kept} whole; they are not searched." if kept else ""
    lines = [
        "# Which LoRA rank for which layer?",
        "",
        verdict(outcome),
        "",
        as_markdown(table(outcome)),
        "",
        f"Perplexity: mean (range) over {N_REPORT_SEEDS} fresh seeds of data order and initialisation. Accuracy: "
        "four-way choice of the continuation of a passage, run by lm-eval, ± standard error; after recovery on the "
        "first of these seeds.",
        "",
        "## Recommended ranks",
        "",
        as_markdown(columns),
        "",
        f"Trainable parameters: {found.cost:,.0f}, budget {outcome.space.budget or math.inf:,.0f}." + fixed,
        "",
        "![Rank per layer beside its sensitivity and what pruning took from it](ranks.png)",
        "",
        f"What it rests on: {evidence.statement} Closest trials: {'; '.join(closest)}.",
        "",
        "![Best so far against uniform](progress.png)",
        "",
        "## Use it",
        "",
        "```python",
        "import rankadaptor_optuna  # makes the pruned architecture known",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{(out / "pruned").as_posix()}")',
        f'model = PeftModel.from_pretrained(model, "{(out / "adapter").as_posix()}")',
        "```",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(outcome.recipe, indent=1),
        "```",
        "",
    ]
    write_text(out / "report.md", "\n".join(lines))
