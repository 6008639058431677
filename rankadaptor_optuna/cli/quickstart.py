"""``rankadaptor quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rankadaptor_optuna.cli.options import Out, as_ranks, say

Granularity = Literal["layer", "sublayer"]


def quickstart(
    trials: Annotated[int, typer.Option(metavar="N", help="Number of trials to reach.")] = 10,
    out: Out = Path("rankadaptor-out"),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of pruning, search and recovery.")] = 0,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Model folder or Hub name, or embedded: SmolLM2-135M-Instruct.")
    ] = "embedded",
    ratio: Annotated[float, typer.Option(metavar="R", help="Share of the blocks' parameters to prune.")] = 0.25,
    candidates: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks that a layer may take.")] = "2,4,6,8,10,12",
    budget: Annotated[str, typer.Option(metavar="N|uniform:RANK", help="Most trainable parameters.")] = "uniform:8",
    granularity: Annotated[
        Granularity, typer.Option(help="One rank per layer, or one for its attention and one for its MLP.")
    ] = "layer",
    steps: Annotated[int, typer.Option(metavar="N", help="Training steps of one recovery.")] = 8,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna storage.", show_default="SQLite in --out")
    ] = None,
    study: Annotated[str, typer.Option(metavar="NAME", help="Study name.")] = "quickstart",
) -> None:
    """Prune, search, recover and report on a small model.

    Run the same command again to continue where it stopped.
    """
    from rankadaptor_optuna.database.connections import masked
    from rankadaptor_optuna.jobs.quickstart import quickstart as run_quickstart
    from rankadaptor_optuna.jobs.recipe import Recipe
    from rankadaptor_optuna.views.comparison import comparison_table
    from rankadaptor_optuna.views.report import report_verdict, write_report
    from rankadaptor_optuna.views.tables import text_table

    settings = {
        "preset": "quickstart",
        "model": model,
        "seed": seed,
        "pruning": {"ratio": ratio},
        "space": {"candidates": as_ranks(candidates), "budget": budget, "granularity": granularity},
        "training": {"steps": steps},
    }
    result = run_quickstart(Recipe.from_dict(settings), out, trials=trials, storage=storage, study_name=study, say=say)
    write_report(result)
    say(f"\n{text_table(comparison_table(result.comparison))}\n\n{report_verdict(result)}\n")
    say(f"Done in {result.seconds / 60:.1f} minutes. Report: {out / 'report.md'}")
    say(f"Browse the trials: rankadaptor dashboard --storage {masked(result.search.storage)}")
