"""The output folder of a job: its settings, its measurements, whole files; and the progress bar."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from rankadaptor_optuna.checks.folders import check_writable
from rankadaptor_optuna.studies.storage import check_same_settings


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, values: Any) -> None:  # noqa: ANN401
    """Writes a JSON file completely or not at all."""
    write_text(path, json.dumps(values, indent=1))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        if isinstance(values := json.loads(path.read_text(encoding="utf-8")), dict):
            return values
        reason = f"an object was expected, got a {type(values).__name__}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{path} is damaged: {reason}. Restore the file, or choose another --out.")


class OutputFolder:
    """The folder of a job's files, which belongs to one set of settings; nothing is written before ``start``.

    Args:
        path: The folder.
        settings: Settings of the job, JSON-able.
        read: Brings stored settings of an earlier version into the current format.

    Attributes:
        path: The folder.
        stored: Settings of an earlier run as ``settings.json`` holds them; empty without an earlier run.
        measured: Measurements so far, as ``results.json`` holds them.

    Raises:
        ValueError: The folder cannot be written to, or is not empty and belongs to other settings, which the message
            names.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        self.path, self._settings = path, json.loads(json.dumps(settings))  # tuples become lists, as in the file
        check_writable(path)
        self.stored: Mapping[str, Any] = {}
        self.measured: dict[str, Any] = {}
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        file, results = path / "settings.json", path / "results.json"
        if not file.exists():
            raise ValueError(f"--out {path} is not empty and not of an earlier run; choose an empty or a new folder.")
        self.stored = _read_json(file)
        check_same_settings(f"--out {path}", read(self.stored), settings, "another --out")
        if results.exists():
            self.measured = _read_json(results)

    def start(self) -> None:
        """Creates the folder and writes ``settings.json``."""
        if self.stored != self._settings:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "settings.json", self._settings)
            self.stored = self._settings

    def record(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Writes a measurement."""
        self.start()
        self.measured[key] = value
        write_json(self.path / "results.json", self.measured)

    def measure(self, key: str, compute: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Returns a measurement, computed and written if it is missing."""
        if key not in self.measured:
            self.record(key, compute())
        return self.measured[key]


@contextmanager
def only_process(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lets one process of this machine and user at a time work in a folder; others wait, and say so."""
    name = f"{getattr(os, 'getuid', int)()}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    lock = FileLock(Path(tempfile.gettempdir()) / f"rankadaptor-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that works in {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def bar(name: str, total: int) -> tqdm:
    """Returns a progress bar that disappears when it is closed; it shows nothing outside of a terminal."""
    return tqdm(total=total, desc=f"      {name}", leave=False, dynamic_ncols=True, smoothing=0.1, disable=None)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback for (done, total) that shows a progress bar from its first call on."""
    shown: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(bar(name, total))
        shown[0].total = total
        shown[0].update(done - shown[0].n)

    try:
        yield progress
    finally:
        for each in shown:
            each.close()
