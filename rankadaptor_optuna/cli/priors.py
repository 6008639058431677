"""``rankadaptor priors list``, ``show``, ``prune`` and ``gc``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankadaptor_optuna.cli.options import Storage, say


def versions(storage: Storage) -> None:
    """List all versions of all priors."""
    from rankadaptor_optuna.views.priors import versions_table
    from rankadaptor_optuna.views.tables import text_table

    say(text_table(versions_table(storage)))


def show(
    prior: Annotated[
        str, typer.Argument(metavar="PRIOR", help="pretrained, a file, or db:NAME[@VERSION] in --storage.")
    ] = "pretrained",
    storage: Annotated[str | None, typer.Option(metavar="URL", help="Optuna storage.")] = None,
) -> None:
    """Show the tasks of a prior and how well it transfers."""
    from rankadaptor_optuna.jobs.priors import read_prior
    from rankadaptor_optuna.views.priors import card_text, is_complete, tasks_table
    from rankadaptor_optuna.views.tables import text_table

    found = read_prior(prior, storage)
    say(card_text(found))
    if is_complete(found.card):
        say(f"\n{text_table(tasks_table(found))}")


def prune_versions(
    storage: Storage,
    prior: Annotated[str | None, typer.Argument(metavar="PRIOR", help="db:NAME.", show_default="all priors")] = None,
    keep: Annotated[int, typer.Option(metavar="N", help="Number of newest versions to keep.")] = 3,
) -> None:
    """Remove old versions that no study uses."""
    from rankadaptor_optuna.jobs.priors import prune_versions as remove
    from rankadaptor_optuna.priors.store import parse_reference
    from rankadaptor_optuna.views.priors import removed_text

    say(removed_text(remove(storage, keep, None if prior is None else parse_reference(prior)[0])))


def collect(storage: Storage) -> None:
    """Remove what only deleted studies used."""
    from rankadaptor_optuna.jobs.priors import collect_unused
    from rankadaptor_optuna.views.priors import collected_text

    say(collected_text(collect_unused(storage)))
