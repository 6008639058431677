"""Folders that commands write to: checked before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path

_PROBE = bytes(1 << 20)  # written and removed; set by hand, more than all files of a command but its models


def check_writable(path: Path) -> None:
    """Checks that files can be written below a path, which need not exist, by writing one and removing it.

    Raises:
        ValueError: A part of the path is a file, or the disk is read-only or full.
    """
    folder = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not folder.is_dir():
        raise ValueError(f"cannot write to {path}: {folder} is a file; choose another folder.")
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(_PROBE)
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}; choose another folder.") from None
