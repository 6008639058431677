"""Options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rankadaptor_optuna.checks.plain_text import printable

Storage = Annotated[str, typer.Option(metavar="URL", help="Optuna storage.")]
Study = Annotated[str | None, typer.Option(metavar="NAME", help="Study name.", show_default="the storage's only study")]
Pruned = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Pruned model.", show_default="prune as the recipe says")
]
TrustStudy = Annotated[
    bool,
    typer.Option("--trust-study", help="Use local files, and tasks with code, that the study's recipe names."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for all files.")]


def list_commands(ctx: typer.Context) -> None:
    """Shows the help with the list of commands, unless a command was given."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def say(line: str) -> None:
    """Prints a step or the result of a job at once, without control characters that others may have stored."""
    print(printable(line), flush=True)


def as_ranks(text: str) -> tuple[int, ...]:
    """Returns the ranks in a text like ``2,4,8``."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"candidates must be ranks like 2,4,8, got {text!r}.") from None
