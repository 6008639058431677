"""Prior: a meta-learned start of the performance model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rankadaptor_optuna.surrogate.features import MLP, N_INPUTS
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.old_formats import prior_card, without_sensitivity_input
from rankadaptor_optuna.surrogate.tensor_files import pack_tensors, read_tensors, unpack_tensors, write_tensors

FORMAT = "2"
READABLE = ("1", FORMAT)
# Limits of a prior that anyone may have written, set by hand, far from any that was learned: sizes and numbers beyond
# these exhaust memory, or overflow in the performance model.
_MOST_OUTPUTS, _MOST_HIDDEN, _MOST_LAYERS = 1024, 4096, 16
_LARGEST = 1e6
_LARGEST_EFFECT = 1e4  # 16 for the shipped prior; from 1e6 on, covariances are not positive definite
_DEEPEST_CARD = 16
PRETRAINED = Path(__file__).parent / "pretrained" / "prior.safetensors"


@dataclass(frozen=True)
class Prior:
    """A meta-learned start of the performance model: a feature network, and a Gaussian over its output weights.

    Attributes:
        mlp: Feature network with M outputs.
        mean: Expected weight of each output, (M,), for standardised scores where higher is better.
        std: Standard deviation of a new task's weights about ``mean``, (M,).
        card: Description of the tasks that it was learned from and of how well it transfers, JSON-able.

    Raises:
        ValueError: Shapes do not fit together, or a number is not finite or too large; the message names the tensor.
    """

    mlp: MLP
    mean: Array
    std: Array
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [N_INPUTS, *(weight.shape[1] if weight.ndim == 2 else 0 for weight in self.mlp.weights)]
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "std"), (sizes[-1],))
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            expected |= {f"mlp.{i}.weight": (n_in, n_out), f"mlp.{i}.bias": (n_out,)}
        for name, value in self.tensors.items():
            if value.dtype not in (np.float32, np.float64):
                raise ValueError(f"{name} must be of float64, got {value.dtype}")
            if value.shape != expected[name] or not value.size:
                raise ValueError(f"{name} must have shape {expected[name]}, got {value.shape}")
            if not np.abs(value).max() <= _LARGEST:  # not so for NaN either
                raise ValueError(f"{name} must be finite, at most {_LARGEST:g}, got {np.abs(value).max()}")
        if not self.std.min() >= 1 / _LARGEST:
            raise ValueError(f"std must be at least {1 / _LARGEST:g}, got {self.std.min()}")
        reach = np.abs(self.mlp.weights[-1]).sum(0) + np.abs(self.mlp.biases[-1])  # most of each output: |tanh| < 1
        if (largest := (reach * (np.abs(self.mean) + self.std)).max()) > _LARGEST_EFFECT:
            raise ValueError(
                f"it expects scores of up to {largest:.2g} standard deviations, {_LARGEST_EFFECT:g} at most"
            )
        if sizes[-1] > _MOST_OUTPUTS or max(sizes) > _MOST_HIDDEN or len(sizes) > _MOST_LAYERS + 1:
            raise ValueError(f"the network is too large: widths {sizes[:_MOST_LAYERS]}")

    @property
    def tensors(self) -> dict[str, Array]:
        """The arrays by name, for a file."""
        tensors = {"mean": self.mean, "std": self.std}
        for i, (weight, bias) in enumerate(zip(self.mlp.weights, self.mlp.biases, strict=True)):
            tensors |= {f"mlp.{i}.weight": weight, f"mlp.{i}.bias": bias}
        return tensors

    @cached_property
    def checksum(self) -> str:
        """Identity of the weights, 12 hexadecimal digits; the card does not count."""
        return _checksum(self.tensors)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Array], card: Mapping[str, Any] | None = None) -> Prior:
        """Returns the prior that has these ``tensors``, which may be those of an earlier format."""
        depth = sum(name.endswith(".weight") for name in tensors)
        named = {f"mlp.{i}.{kind}" for i in range(depth) for kind in ("weight", "bias")}
        if depth < 1 or tensors.keys() != {"mean", "std", *named}:
            found = ", ".join(sorted(tensors))
            raise ValueError(f"a prior has mean, std and mlp.0.weight to mlp.N.bias, its tensors are {found:.200}")
        mean, std, converted = tensors["mean"], tensors["std"], without_sensitivity_input(tensors)
        mlp = MLP(*([converted[f"mlp.{i}.{kind}"] for i in range(depth)] for kind in ("weight", "bias")))
        prior = cls(mlp, mean, std, card or {})
        if converted is not tensors:  # studies name their prior by the weights in its file
            prior.__dict__["checksum"] = _checksum(tensors)
        return prior

    def _metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "card": json.dumps(dict(self.card))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with the card in its metadata.

        Raises:
            ValueError: The file cannot be written.
        """
        write_tensors(path, self.tensors, self._metadata())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """Reads the file of a prior.

        Raises:
            ValueError: The file is missing, not safetensors, not a prior, or of a format that is not read.
        """
        return cls._read(*read_tensors(path, "prior", *READABLE), f"prior {os.fspath(path)!r}")

    def dumps(self) -> bytes:
        """Returns the content of the file that ``save`` writes."""
        return pack_tensors(self.tensors, self._metadata())

    @classmethod
    def loads(cls, data: bytes, what: str) -> Prior:
        """Reads the content of a prior's file; ``what`` names it in error messages.

        Raises:
            ValueError: ``data`` is not safetensors, not a prior, or of a format that is not read.
        """
        return cls._read(*unpack_tensors(data, what, *READABLE), what)

    @classmethod
    def _read(cls, tensors: dict[str, Array], metadata: dict[str, str], what: str) -> Prior:
        try:
            return cls.from_tensors(tensors, _checked_card(prior_card(metadata)))
        except RecursionError:
            raise ValueError(f"cannot read the {what}: its card is nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot read the {what}: {error}") from error


def _checked_card(card: Any) -> Any:  # noqa: ANN401
    """Returns a card as it is.

    Raises:
        RecursionError: It is nested too deeply to be shown.
    """
    level = [card]
    for _ in range(_DEEPEST_CARD):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
    if level:
        raise RecursionError
    return card


def _checksum(tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:12]


def load_prior(prior: str | os.PathLike[str] | None) -> Prior | None:
    """Returns the shipped prior for ``"pretrained"``, None for None, else the prior of a file.

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
