"""The ``rankadaptor`` command: a file per command, assembled in ``app``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rankadaptor_optuna.checks.extras import import_hint


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see ``app.main``. Without Typer, says how to install it."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"rankadaptor: error: {import_hint(error)}", file=sys.stderr)
        return 2
    from rankadaptor_optuna.cli.app import main

    return main(argv)
