"""``rankadaptor export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankadaptor_optuna.cli.options import Pruned, Storage, Study, TrustStudy, say


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    storage: Storage,
    study: Study = None,
    pruned: Pruned = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Training steps.", show_default="as in the recipe")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of data order and initialisation.", show_default="as in the recipe"),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the merged model.")] = False,
    trust_study: TrustStudy = False,
) -> None:
    """Train the recommended ranks and write the adapter.

    Writes a PEFT adapter, rank_pattern.json and a model card.
    """
    from rankadaptor_optuna.jobs.export import export as run_export
    from rankadaptor_optuna.views.card import write_card

    exported = run_export(
        storage, study, out, pruned=pruned, steps=steps, seed=seed, merge=merge, trust_study=trust_study, say=say
    )
    write_card(exported)
    say(f"Adapter, rank_pattern.json and model card: {out}")
