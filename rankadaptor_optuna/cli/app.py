"""Assembles the commands, sets up what they share, and reports errors in one line."""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from rankadaptor_optuna import __version__
from rankadaptor_optuna.checks.extras import import_hint, require
from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.cli.compare import compare
from rankadaptor_optuna.cli.dashboard import dashboard
from rankadaptor_optuna.cli.export import export
from rankadaptor_optuna.cli.import_checkpoint import import_checkpoint
from rankadaptor_optuna.cli.meta_train import meta_train
from rankadaptor_optuna.cli.options import list_commands
from rankadaptor_optuna.cli.priors import collect, prune_versions, show, versions
from rankadaptor_optuna.cli.prune import prune
from rankadaptor_optuna.cli.quickstart import quickstart
from rankadaptor_optuna.cli.search import search

_INTERRUPTED = 130  # 128 + SIGINT
Run = Callable[..., None]
_typer = functools.partial(
    typer.Typer, invoke_without_command=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

_RECIPE = ("transformers", "peft", "pydantic")
# the commands in the order of the help, and the optional libraries without which they could not end
_NEEDED: dict[Run, Sequence[str]] = {
    quickstart: (*_RECIPE, "matplotlib", "plotly", "optuna_dashboard"),
    search: _RECIPE,
    export: _RECIPE,
    compare: (*_RECIPE, "matplotlib"),
    prune: ("transformers",),
    import_checkpoint: ("transformers",),
    meta_train: (),
    dashboard: ("optuna_dashboard", "plotly"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 on success, 2 on bad input (one line on stderr), 130 when interrupted."""
    called = {"command": ""}
    args = None if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may lack characters of a study's name
            stream.reconfigure(errors="backslashreplace")
    try:
        code = build_app()(args, prog_name="rankadaptor", standalone_mode=False, obj=called)
    except (typer.TyperException, ValueError, ImportError, OSError) as error:
        print(f"rankadaptor{called['command']}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    if code == _INTERRUPTED:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
    return code or 0


def _one_line(error: Exception) -> str:
    """Returns what is wrong, with the value seen."""
    if isinstance(error, typer.TyperException):
        message, _, unparsed = error.format_message().replace("Value error, ", "").partition(", unable to parse")
        if unparsed:  # pydantic leaves the value out of its message
            message += f", got {error.__cause__.errors()[0]['input']!r}"  # type: ignore[union-attr]
    elif isinstance(error, ModuleNotFoundError):
        message = import_hint(error)
    else:
        message = str(error)
    return one_line(message)


def build_app() -> typer.Typer:
    """Returns the application with all its commands."""
    app = _typer(callback=_root)
    for command, needed in _NEEDED.items():
        app.command()(_prepared(command, needed))
    priors = _typer(callback=list_commands)
    on_priors: dict[str, Run] = {"list": versions, "show": show, "prune": prune_versions, "gc": collect}
    for name, command in on_priors.items():
        priors.command(name)(_prepared(command))
    app.add_typer(priors, name="priors", help="List, show and tidy the priors of a database.")
    return app


def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Finds a LoRA rank for each layer of a pruned language model."""
    if version:
        print(__version__)
        raise typer.Exit
    list_commands(ctx)
    ctx.obj["command"] = f" {ctx.invoked_subcommand}"


def _prepared(command: Run, needed: Sequence[str] = ()) -> Run:
    """Returns the command with the libraries' messages turned off; it is refused where a needed library is missing."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:  # noqa: ANN401
        # on a busy machine, threads that spin long while they wait slow everything down several times
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        require(*needed)
        if "transformers" in needed:
            from rankadaptor_optuna.recovery.models import quiet

            quiet()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command(**arguments)

    return run


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning in one line."""
    print(f"rankadaptor: warning: {one_line(str(message))}", file=sys.stderr)
