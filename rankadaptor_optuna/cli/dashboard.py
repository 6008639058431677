"""``rankadaptor dashboard``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankadaptor_optuna.cli.options import Storage


def dashboard(
    storage: Storage,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on; 0: any free port.")] = 8080,
    artifact_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the studies' artifacts.", show_default="no artifacts")
    ] = None,
) -> None:
    """Browse studies in optuna-dashboard.

    The server asks for no password: whoever reaches --host can read and change the studies. It refuses requests by
    pages of other sites.
    """
    from rankadaptor_optuna.views.server import serve

    serve(storage, host=host, port=port, artifact_dir=artifact_dir)
