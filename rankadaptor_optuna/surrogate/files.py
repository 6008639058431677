"""Safetensors with a format in their metadata, in files and elsewhere: how performance model and prior are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rankadaptor_optuna.surrogate.grid import Array


def dumps(tensors: Mapping[str, NDArray[np.generic]], metadata: dict[str, str]) -> bytes:
    """Tensors of any memory layout as the content of a safetensors file."""
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata)


def loads(data: bytes, what: str, *versions: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of ``data``, whose metadata must have one of the ``versions`` as its ``format``.

    Args:
        data: Content of a safetensors file.
        what: What it is, for messages.
        *versions: The formats that are read.

    Raises:
        ValueError: It is not safetensors, or of another format.
    """
    try:
        tensors = {name: value.copy() for name, value in load(data).items()}
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type of numbers that NumPy has not
        raise ValueError(f"cannot read the {what}: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if (found := metadata.get("format")) not in versions:
        raise ValueError(f"{what} has format {found!r}; this version reads {' and '.join(map(repr, versions))}.")
    return tensors, metadata


def write(path: str | os.PathLike[str], tensors: Mapping[str, NDArray[np.generic]], metadata: dict[str, str]) -> None:
    """Writes a file; see ``dumps``.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        Path(path).write_bytes(dumps(tensors, metadata))
    except OSError as error:
        raise ValueError(f"cannot write {os.fspath(path)!r}: {error}") from error


def read(path: str | os.PathLike[str], what: str, *versions: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads a file; see ``loads``.

    Raises:
        ValueError: The file is missing, not safetensors, or of another format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the {what} {os.fspath(path)!r}: {error}") from error
    return loads(data, f"{what} {os.fspath(path)!r}", *versions)
