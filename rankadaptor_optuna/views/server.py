"""serve: the studies of a database in optuna-dashboard."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.connections import masked
from rankadaptor_optuna.priors.choice import PriorChoice, PriorLike
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.views.dashboard import publish_reading, require_dashboard

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:@/\[\]]+)(?::\d+)?")  # of a request, with its port
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LARGEST_PORT = 65535
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104


def serve(
    storage_url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    artifact_dir: str | Path | None = None,
    prior: PriorLike = "pretrained",
) -> None:
    """Publishes every study with rank parameters in a database, then runs optuna-dashboard until interrupted.

    The server asks for no password: whoever reaches ``host`` can read and change the studies. It refuses requests that
    pages of other sites make in a browser on this machine.

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
        server.set_app(same_origin(wsgi(storage, artifact_store=artifacts), host))
        shown = f"[{host}]" if ":" in host else host
        print(f"{masked(storage_url)} at http://{shown}:{server.server_port}/ (Ctrl-C to quit)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def same_origin(app: WSGIApplication, host: str) -> WSGIApplication:
    """Returns a WSGI application that answers 403 to other names of this machine, and to pages of other origins.

    A page of another site could else delete studies: by a request to this machine, or by a name of its own that it lets
    point to this machine.

    Args:
        app: The application.
        host: Address that the server listens on; with a wildcard, such as ``0.0.0.0``, all names are accepted.
    """
    names = None if host in _WILDCARDS else {host.lower().strip("[]"), *_LOOPBACK}

    def checked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        asked, origin = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN")
        named = _HOST.fullmatch(asked)
        known = named is not None and (names is None or named[1].strip("[]").lower() in names)
        if known and origin in (None, f"http://{asked}", f"https://{asked}"):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"Refused: host {one_line(asked)!r}, origin {one_line(origin or '')!r}.\n".encode()]

    return checked


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # threads: a browser's idle connection would block the next request

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """Logs nothing: the page polls every few seconds."""


def _listening(host: str, port: int) -> WSGIServer:
    if not host.strip():  # to the system, any address
        raise ValueError("the host is empty; give an address, such as 127.0.0.1, or 0.0.0.0 for all networks.")
    if not 0 <= port <= _LARGEST_PORT:
        raise ValueError(f"port must be 0 to {_LARGEST_PORT}, got {port}.")
    try:
        return _Server(host, port)
    except OSError as error:
        hint = "Stop the process that uses it, or choose another port (0 takes any free port)."
        raise ValueError(f"cannot listen on port {port} of {host}: {error}. {hint}") from None
