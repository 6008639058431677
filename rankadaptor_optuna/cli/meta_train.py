"""``rankadaptor meta-train``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankadaptor_optuna.cli.options import Storage, say


def meta_train(
    storage: Storage,
    study: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Studies to learn from, with * and ?; repeatable.", show_default="all"),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="PATTERN", hidden=True)] = None,  # --study A B
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the prior.")] = "default",
) -> None:
    """Learn a prior from the studies of a database.

    Adds the prior to the database as the next version of its name, for search --prior db:NAME and
    RankAdaptorSampler(prior="db:NAME").
    """
    from rankadaptor_optuna.jobs.meta_train import train_prior
    from rankadaptor_optuna.views.priors import card_text

    trained = train_prior(storage, name, [*(study or []), *(more or [])], say=say)
    say(card_text(trained.prior))
    say(f"Stored as {trained.version}: RankAdaptorSampler(prior='db:{trained.version.name}')")
