"""PerformanceModel: the public name for both implementations of the performance model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from rankadaptor_optuna.surrogate.base import ModelBase
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.model_files import read_model, write_model
from rankadaptor_optuna.surrogate.network import HIDDEN, Network
from rankadaptor_optuna.surrogate.paper import PaperModel
from rankadaptor_optuna.surrogate.prior import Prior, load_prior

if TYPE_CHECKING:
    from rankadaptor_optuna.space import RankSpace


class PerformanceModel:
    """Predicts the score of a rank configuration from finished trials.

    In its default mode it is a ``surrogate.bayesian.BayesianModel``: meta-learned features and a closed-form Bayesian
    head. In paper mode it is a ``surrogate.paper.PaperModel``: the paper's gradient-trained MLP, for comparison.
    Attributes that only one of them has, such as ``BayesianModel.sample``, are available in its mode.

    Args:
        space: The rank space (or a ``RankGrid`` of searched layers).
        prior: ``"pretrained"`` (shipped), None, a path, or a ``Prior``. In paper mode: a network that ``pretrain`` or
            ``reptile`` of ``priors.pretraining`` returned; None and ``"pretrained"`` stand for an untrained one.
        direction: ``"maximize"`` or ``"minimize"``: whether higher or lower scores are better.
        n_ordinary: Width of the ordinary parameters' points, 0 where only ranks are searched.
        mode: ``"bayesian"`` or ``"paper"``.
        hidden: Widths of the three hidden layers; paper mode only.
        seed: Seed of initialisation and training; paper mode only, the other draws nothing at random by itself.

    Raises:
        ValueError: The prior cannot be read, or the direction, mode or hidden widths are invalid.
    """

    def __init__(
        self,
        space: RankSpace | RankGrid,
        *,
        prior: Prior | Network | str | os.PathLike[str] | None = "pretrained",
        direction: str = "maximize",
        n_ordinary: int = 0,
        mode: str = "bayesian",
        hidden: Sequence[int] = HIDDEN,
        seed: int = 0,
    ) -> None:
        self._model: ModelBase
        if mode == BayesianModel.mode:
            if not (prior is None or isinstance(prior, (Prior, str, os.PathLike))):
                raise ValueError(f"mode {mode!r} starts from a Prior or the path of one, got {type(prior).__name__}.")
            loaded = prior if isinstance(prior, Prior) else load_prior(prior)
            self._model = BayesianModel(space, prior=loaded, direction=direction, n_ordinary=n_ordinary)
        elif mode == PaperModel.mode:
            if not (isinstance(prior, Network) or prior in (None, "pretrained")):
                raise ValueError(f"in paper mode a prior is None or what pretrain or reptile returns, got {prior!r}.")
            start = prior if isinstance(prior, Network) else None
            self._model = PaperModel(
                space, prior=start, direction=direction, n_ordinary=n_ordinary, hidden=hidden, seed=seed
            )
        else:
            raise ValueError(f'mode must be "bayesian" or "paper", got {mode!r}.')

    @property
    def mode(self) -> str:
        """``"bayesian"`` or ``"paper"``."""
        return self._model.mode

    @property
    def grid(self) -> RankGrid:
        """The searched layers."""
        return self._model.grid

    @property
    def noise(self) -> float:
        """Standard deviation of a trial's score about its expectation, in score units."""
        return self._model.noise

    def encode(self, ranks: ArrayLike, points: ArrayLike | None = None) -> Array:
        """Returns the features of configurations, (n, F); see ``ModelBase.encode``."""
        return self._model.encode(ranks, points)

    def update(
        self, ranks: ArrayLike, scores: ArrayLike, points: ArrayLike | None = None, variance: ArrayLike = 0.0
    ) -> None:
        """Adds finished trials: ranks (n, L), scores (n,), and more; see ``ModelBase.update``.

        Raises:
            ValueError: Shapes do not match, or a score or variance is not finite.
        """
        self._model.update(ranks, scores, points, variance)

    def predict(self, ranks: ArrayLike, points: ArrayLike | None = None) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the score, each (n,), in score units.

        The standard deviation includes the trials' noise in paper mode only.
        """
        return self._model.predict(ranks, points)

    def predict_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the gain over the uniform configuration, each (n,), in score units.

        Positive is better, whatever the direction.
        """
        return self._model.predict_gain(ranks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything on which predictions and further updates rest, as safetensors.

        Raises:
            ValueError: The file cannot be written.
        """
        write_model(self._model, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerformanceModel:
        """Reads a saved model; it predicts the same to the last bit, and learns on from where the saved one stopped.

        Raises:
            ValueError: The file is missing, holds no performance model, or has a format that is not read.
        """
        model = cls.__new__(cls)
        model._model = read_model(path)
        return model

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Everything else that the mode's implementation has."""
        if name.startswith("_"):  # private names, and _model itself while an instance is unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._model, name)
