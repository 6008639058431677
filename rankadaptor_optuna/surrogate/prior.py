"""The meta-learned prior: the MLP that makes features, and where its weights are expected to lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.files import dumps, loads, read, write
from rankadaptor_optuna.surrogate.grid import Array

FORMAT = "2"
_FORMATS = ("1", FORMAT)  # of the first the card is another
PRETRAINED = Path(__file__).parent / "pretrained" / "prior.safetensors"


@dataclass(frozen=True)
class Prior:
    """A meta-learned start of the performance model.

    Attributes:
        mlp: Feature network.
        mean: Expected weight of each of its features, (M,), for standardised scores where higher is better.
        std: How far a new task's weight strays from that, (M,).
        card: What it was learned from and how well it transfers, JSON-able.
    """

    mlp: MLP
    mean: Array
    std: Array
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Array]:
        """All its arrays by name."""
        tensors = {"mean": self.mean, "std": self.std}
        for i, (weight, bias) in enumerate(zip(self.mlp.weights, self.mlp.biases, strict=True)):
            tensors |= {f"mlp.{i}.weight": weight, f"mlp.{i}.bias": bias}
        return tensors

    @property
    def checksum(self) -> str:
        """What tells its weights from others', 12 hexadecimal digits; the card does not count."""
        digest = hashlib.sha256()
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()[:12]

    @classmethod
    def of(cls, tensors: Mapping[str, Array], card: Mapping[str, Any] | None = None) -> Prior:
        """The prior that has these ``tensors``."""
        depth = sum(name.endswith(".weight") for name in tensors)
        return cls(
            mlp=MLP(
                [tensors[f"mlp.{i}.weight"] for i in range(depth)],
                [tensors[f"mlp.{i}.bias"] for i in range(depth)],
            ),
            mean=tensors["mean"],
            std=tensors["std"],
            card=card or {},
        )

    def _metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "card": json.dumps(dict(self.card))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors, with the card in the metadata."""
        write(path, self.tensors, self._metadata())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is missing, not safetensors, not a prior, or of another format.
        """
        return cls._of(*read(path, "prior", *_FORMATS), f"prior {os.fspath(path)!r}")

    def dumps(self) -> bytes:
        """The content of the file that ``save`` writes."""
        return dumps(self.tensors, self._metadata())

    @classmethod
    def loads(cls, data: bytes, what: str) -> Prior:
        """Reads what ``dumps`` made; ``what`` it is, for messages.

        Raises:
            ValueError: It is not safetensors, not a prior, or of another format.
        """
        return cls._of(*loads(data, what, *_FORMATS), what)

    @classmethod
    def _of(cls, tensors: Mapping[str, Array], metadata: dict[str, str], what: str) -> Prior:
        try:
            card = {name: text for name, text in metadata.items() if name not in ("format", "card")}  # as it was kept
            return cls.of(tensors, {**card, **json.loads(metadata.get("card", "{}"))})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the {what}: {error!r}") from error


def load_prior(prior: str | os.PathLike[str] | None) -> Prior | None:
    """``"pretrained"`` is the shipped prior, None is none, anything else a path.

    Raises:
        ValueError: The file cannot be read.
    """
    if prior is None:
        return None
    path = PRETRAINED if prior == "pretrained" else Path(prior)
    if not path.exists():
        raise ValueError(
            f"cannot read the prior {os.fspath(prior)!r}: there is no such file; one of a database is named db:NAME."
        )
    return Prior.load(path)
