"""Safetensors files with a format in their metadata: how the performance model and its prior are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rankadaptor_optuna.surrogate.features import Array


def write(path: str | os.PathLike[str], tensors: Mapping[str, NDArray[np.generic]], metadata: dict[str, str]) -> None:
    """Writes tensors of any memory layout.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(contiguous, os.fspath(path), metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {os.fspath(path)!r}: {error}") from error


def read(path: str | os.PathLike[str], what: str, version: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a file whose metadata has ``version`` as its ``format``; ``what`` it holds, for messages.

    Raises:
        ValueError: The file is missing, not safetensors, or of another format.
    """
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != version:
                raise ValueError(f"{what} {os.fspath(path)!r} has format {found!r}; this version reads {version!r}.")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the {what} {os.fspath(path)!r}: {error}") from error
