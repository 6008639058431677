"""``rankadaptor search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rankadaptor_optuna.cli.options import Out, TrustStudy, say


def search(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="TOML file.", show_default="the recipe of the study")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Number of trials to reach.", show_default="the study's, else 25")
    ] = None,
    out: Out = Path("rankadaptor-search"),
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna storage.", show_default="SQLite in --out")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Study name.", show_default="search; without RECIPE, the only study"),
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            metavar="PRIOR",
            help="Prior of a new study: pretrained, none, a file, or db:NAME[@VERSION] in --storage.",
        ),
    ] = "pretrained",
    on_bad_prior: Annotated[
        Literal["raise", "pretrained"],
        typer.Option(help="If the prior is missing, corrupt or too new: stop, or take the pretrained one."),
    ] = "raise",
    trust_study: TrustStudy = False,
) -> None:
    """Search ranks for your model as a recipe says.

    Prunes the model of a recipe, searches a LoRA rank per layer and recommends. Run the same command again to
    continue; run it elsewhere with the same --storage and --study to add a worker.
    """
    from rankadaptor_optuna.jobs.recipe import Recipe
    from rankadaptor_optuna.jobs.search import search as run_search
    from rankadaptor_optuna.jobs.stored import stored_study
    from rankadaptor_optuna.recovery.processes import process_index

    if recipe is not None:
        settings, study = Recipe.load(recipe), "search" if study is None else study
    elif storage is not None:
        found, settings = stored_study(storage, study, trust_study)
        study = found.study_name
    else:
        raise ValueError("give a recipe, or the --storage of a study that has one.")
    result = run_search(
        settings,
        out,
        trials=trials,
        storage=storage,
        study_name=study,
        prior=None if prior == "none" else prior,
        on_bad_prior=on_bad_prior,
        say=say,
    )
    if process_index() == 0:
        say(f"Ranks and arguments of peft.LoraConfig: {result.out / 'recommendation.json'}")
