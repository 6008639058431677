"""``rankadaptor compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankadaptor_optuna.cli.options import Out, Pruned, Storage, Study, TrustStudy, say


def compare(
    storage: Storage,
    study: Study = None,
    pruned: Pruned = None,
    out: Out = Path("rankadaptor-compare"),
    seeds: Annotated[int, typer.Option(metavar="N", help="Number of fresh seeds.")] = 3,
    tasks: Annotated[str, typer.Option(metavar="T,T,...", help="lm-eval tasks.", show_default="as in the recipe")] = "",
    include_path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of further lm-eval tasks.", show_default="as in the recipe"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Items per task.", show_default="the recipe's report_limit")
    ] = None,
    trust_study: TrustStudy = False,
) -> None:
    """Compare the recommended ranks with other recoveries.

    The others are uniform LoRA, AdaLoRA, EVA and Fisher-proportional ranks, on the same data and fresh seeds and within
    the same budget. Run the same
    command again to continue where it stopped.
    """
    from rankadaptor_optuna.jobs.compare import compare as run_compare
    from rankadaptor_optuna.views.comparison import comparison_table, comparison_verdict, write_comparison
    from rankadaptor_optuna.views.tables import text_table

    comparison = run_compare(
        storage,
        study,
        out,
        pruned=pruned,
        seeds=seeds,
        tasks=[name for name in tasks.split(",") if name],
        include_path=include_path,
        limit=limit,
        trust_study=trust_study,
        say=say,
    )
    write_comparison(comparison)
    say(f"\n{text_table(comparison_table(comparison))}\n\n{comparison_verdict(comparison)}\n")
    say(f"Table, measurements and picture: {out}")
