"""The meta-learned prior: the MLP that makes features, and where its weights are expected to lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankadaptor_optuna.surrogate.features import MLP, Array
from rankadaptor_optuna.surrogate.files import read, write

FORMAT = "1"
PRETRAINED = Path(__file__).parent / "pretrained" / "prior.safetensors"


@dataclass(frozen=True)
class Prior:
    """A meta-learned start of the performance model.

    Attributes:
        mlp: Feature network.
        mean: Expected weight of each of its features, (M,), for standardised scores where higher is better.
        std: How far a new task's weight strays from that, (M,).
    """

    mlp: MLP
    mean: Array
    std: Array

    @property
    def tensors(self) -> dict[str, Array]:
        """All its arrays by name."""
        tensors = {"mean": self.mean, "std": self.std}
        for i, (weight, bias) in enumerate(zip(self.mlp.weights, self.mlp.biases, strict=True)):
            tensors |= {f"mlp.{i}.weight": weight, f"mlp.{i}.bias": bias}
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Array]) -> Prior:
        """The prior that has these ``tensors``."""
        depth = sum(name.endswith(".weight") for name in tensors)
        return cls(
            mlp=MLP(
                [tensors[f"mlp.{i}.weight"] for i in range(depth)],
                [tensors[f"mlp.{i}.bias"] for i in range(depth)],
            ),
            mean=tensors["mean"],
            std=tensors["std"],
        )

    def save(self, path: str | os.PathLike[str], card: dict[str, str] | None = None) -> None:
        """Writes safetensors; ``card`` (what it was learned from) goes into the metadata."""
        write(path, self.tensors, {"format": FORMAT, **(card or {})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is missing, not safetensors, or of another format.
        """
        return cls.of(read(path, "prior", FORMAT)[0])


def load_prior(prior: str | os.PathLike[str] | None) -> Prior | None:
    """``"pretrained"`` is the shipped prior, None is none, anything else a path.

    Raises:
        ValueError: The file cannot be read.
    """
    if prior is None:
        return None
    return Prior.load(PRETRAINED if prior == "pretrained" else prior)
