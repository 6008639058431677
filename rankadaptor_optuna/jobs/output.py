"""The output folder of a job: its settings, its measurements, whole files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankadaptor_optuna.studies.storage import differences


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    os.replace(scratch, path)


class Results:
    """What was measured so far, as JSON in a file; each value is computed once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:  # noqa: ANN401
        """The value of a key, computed and written where it is not there yet."""
        if key not in self.values:
            self.values[key] = compute()
            write_text(self._path, json.dumps(self.values, indent=1))
        return self.values[key]


def check_output_folder(out: Path, recipe: dict[str, Any]) -> None:
    """Checks that a folder is new, empty, or of an earlier run with the same settings.

    Raises:
        ValueError: It is not; the message says what differs.
    """
    settings = out / "settings.json"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not settings.exists():
        raise ValueError(f"--out {out} is not empty and not of an earlier run; choose an empty or a new folder.")
    changed = differences(json.loads(settings.read_text()), recipe)
    if changed:
        raise ValueError(
            f"--out {out} belongs to other settings: {'; '.join(changed)}. Use those again, or another --out."
        )


def bar(what: str, total: int) -> tqdm:
    """A progress bar that leaves nothing behind."""
    return tqdm(total=total, desc=f"      {what}", leave=False, dynamic_ncols=True, smoothing=0.1)
