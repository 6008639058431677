"""The file format of a performance model: safetensors with the observations, the search space and the learned state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from rankadaptor_optuna.surrogate.base import ModelBase
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.paper import PaperModel
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.tensor_files import read_tensors, write_tensors

# A file holds features, so the number rises where they change, too. Formats 1 to 3 are not read: they hold features of
# another layout, from which the present ones cannot be computed.
FORMAT = "performance-model-4"


def write_model(model: ModelBase, path: str | os.PathLike[str]) -> None:
    """Writes a performance model.

    Raises:
        ValueError: The file cannot be written.
    """
    settings = {"mode": model.mode, **model.settings}
    write_tensors(path, model.tensors, {"format": FORMAT, "settings": json.dumps(settings)})


def read_model(path: str | os.PathLike[str]) -> BayesianModel | PaperModel:
    """Reads a performance model, which predicts the same to the last bit and learns on from where it was written.

    Raises:
        ValueError: The file is missing, holds no performance model, or has a format that is not read.
    """
    tensors, metadata = read_tensors(path, "performance model", FORMAT)
    model: BayesianModel | PaperModel
    try:
        settings = json.loads(metadata["settings"])
        mode, grid = settings.pop("mode"), RankGrid.from_tensors(_group("grid", tensors))
        prior = _group("prior", tensors)
        if mode == BayesianModel.mode:
            model = BayesianModel(grid, prior=Prior.from_tensors(prior) if prior else None, **settings)
        elif mode == PaperModel.mode:
            model = PaperModel(grid, **settings)
        else:
            raise ValueError(f"unknown mode {mode!r}")
        model.restore(tensors)
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read the performance model {os.fspath(path)!r}: {error!r}") from error
    return model


def _group(name: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the tensors whose names start with the group's name, without it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
