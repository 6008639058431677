"""Reads and writes safetensors whose metadata names a format; priors and performance models are kept in them."""

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


def pack_tensors(tensors: Mapping[str, NDArray[np.generic]], metadata: dict[str, str]) -> bytes:
    """Returns the content of a safetensors file; the arrays may have any memory layout."""
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata)


def unpack_tensors(data: bytes, what: str, *formats: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file's content.

    Args:
        data: Content of the file.
        what: Name of the content in error messages, such as ``prior 'a.safetensors'``.
        *formats: Values of the metadata's ``format`` that the caller can read.

    Raises:
        ValueError: ``data`` is not safetensors, or has another format.
    """
    try:
        tensors = {name: value.copy() for name, value in load(data).items()}
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a data type that NumPy does not have
        raise ValueError(f"cannot read the {what}: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if (found := metadata.get("format")) not in formats:
        raise ValueError(f"{what} has format {found!r}; this version reads {' and '.join(map(repr, formats))}.")
    return tensors, metadata


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[np.generic]], metadata: dict[str, str]
) -> None:
    """Writes a safetensors file; see ``pack_tensors``.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        Path(path).write_bytes(pack_tensors(tensors, metadata))
    except OSError as error:
        raise ValueError(f"cannot write {os.fspath(path)!r}: {error}") from error


def read_tensors(path: str | os.PathLike[str], what: str, *formats: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads a safetensors file; see ``unpack_tensors``.

    Raises:
        ValueError: The file is missing, is not safetensors, or has another format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the {what} {os.fspath(path)!r}: {error}") from error
    return unpack_tensors(data, f"{what} {os.fspath(path)!r}", *formats)
