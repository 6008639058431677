"""serve: the studies of a database in optuna-dashboard."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna

from rankadaptor_optuna.database import masked
from rankadaptor_optuna.plain_text import one_line
from rankadaptor_optuna.priors.choice import PriorChoice, PriorLike
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.views.dashboard import publish_reading, require_dashboard


def serve(
    storage_url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    artifact_dir: str | Path | None = None,
    prior: PriorLike = "pretrained",
) -> None:
    """Publishes every study with rank parameters in a database, then runs optuna-dashboard until interrupted.

    The server asks for no password: whoever reaches ``host`` can read and change the studies.

    Args:
        storage_url: URL of the database, which is not created.
        host: Address to listen on. Default: this machine only.
        port: Port to listen on; 0 takes any free port.
        artifact_dir: Folder of the studies' artifacts; a missing folder is created. Default: no artifacts.
        prior: See ``recommend``. By default, a study whose prior is missing is shown with the pretrained prior.

    Raises:
        ImportError: The extra ``dashboard`` is not installed.
        ValueError: The database cannot be opened, or the address is in use or unknown.
    """
    require_dashboard()
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    if not isinstance(prior, PriorChoice):
        prior = PriorChoice(prior, on_bad="pretrained")  # show a study whose prior is missing
    storage = open_storage(storage_url, create=False, patience=0)
    with _listening(host, port) as server:
        for name in optuna.get_all_study_names(storage):
            try:
                study = optuna.load_study(study_name=name, storage=storage)
                reading = StudyReading(study)
                if reading.rank_names:
                    publish_reading(reading, prior=prior)
            except Exception as error:  # a broken study must not hide the others
                reason = one_line(f"{type(error).__name__}: {error}")
                print(f"warning: study {name!r} is not published: {reason:.300}", file=sys.stderr, flush=True)
        if artifact_dir is not None:
            os.makedirs(artifact_dir, exist_ok=True)
        artifacts = None if artifact_dir is None else FileSystemArtifactStore(artifact_dir)
        server.set_app(wsgi(storage, artifact_store=artifacts))
        shown = f"[{host}]" if ":" in host else host
        print(f"{masked(storage_url)} at http://{shown}:{server.server_port}/ (Ctrl-C to quit)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # threads: a browser's idle connection would block the next request

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """Logs nothing: the page polls every few seconds."""


def _listening(host: str, port: int) -> WSGIServer:
    try:
        return _Server(host, port)
    except (OSError, OverflowError) as error:
        hint = "Stop the process that uses it, or choose another port (0 takes any free port)."
        raise ValueError(f"cannot listen on port {port} of {host}: {error}. {hint}") from None
