"""PaperModel: the paper's performance model, for comparison: an MLP on the rank vector, trained by gradient steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from rankadaptor_optuna.surrogate.base import ModelBase
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.network import HIDDEN, Network
from rankadaptor_optuna.surrogate.statistics import Standardised, standardise

if TYPE_CHECKING:
    from rankadaptor_optuna.space import RankSpace

# set by hand: the paper does not give them
BATCH = 16  # trials per gradient step
_STEPS = 10  # gradient steps for each new trial
_WINDOW = 30  # number of the latest prequential errors that count: a young network's errors say little of it now
_WIDE = 2.0  # standard deviation before there are any errors, in spreads of the scores


class PaperModel(ModelBase):
    """The paper's performance model (section 3.2): an MLP l-32-32-32-1 on the rank vector, trained online.

    From the paper: the rank vector as input, three hidden layers (32-32-32, or 32-64-32 and 32-16-32 in its ablation),
    a linear scalar output, the squared error (equation 5), offline meta-learning and online incremental learning.
    Chosen here: ranks scaled linearly to [-1, 1] over the candidates; Adam at 1e-3 in both phases; 10 steps for each
    new trial, on it and up to 15 earlier ones drawn anew at each step; scores standardised within the study so far.

    The network has no uncertainty of its own. The standard deviation is the root mean square of its latest 30
    prequential errors (each score was predicted before the network was trained on it; Dawid, 1984) and of one error of
    twice the scores' spread, the only one at first. It includes the trials' noise.

    Args:
        space: The rank space (or a ``RankGrid`` of searched layers).
        prior: Network that ``pretrain`` or ``reptile`` returned. Default: an untrained one.
        direction: ``"maximize"`` or ``"minimize"``.
        n_ordinary: Width of the ordinary parameters' points, which join the rank vector.
        hidden: Widths of the three hidden layers.
        seed: Seed of initialisation and training. The same seed and history give the same predictions, however the
            trials are divided into updates.

    Raises:
        ValueError: The prior's shape is another, or the direction or ``hidden`` is invalid.
    """

    mode = "paper"

    def __init__(
        self,
        space: RankSpace | RankGrid,
        *,
        prior: Network | None = None,
        direction: str = "maximize",
        n_ordinary: int = 0,
        hidden: Sequence[int] = HIDDEN,
        seed: int = 0,
    ) -> None:
        super().__init__(space, direction=direction, n_ordinary=n_ordinary)
        self._seed = int(seed)
        self._start = Network(self.n_features, hidden, seed)
        if prior is not None:
            if prior.sizes != self._start.sizes:
                raise ValueError(
                    f"the prior is a network {prior.sizes}, this performance model needs {self._start.sizes}."
                )
            self._start = prior
        self._restart()

    def _restart(self) -> None:
        self._network = self._start.copy()
        self._errors: Array = np.zeros(0)

    @property
    def n_features(self) -> int:
        """Number of the network's inputs, F."""
        return self.grid.n_layers + self._n_ordinary

    def _encode(self, ranks: Array, points: Array) -> Array:
        return np.concatenate([network_inputs(self.grid, ranks), 2 * points - 1], axis=1)

    def fit(self, features: Array, scores: Array, variance: Array | None = None) -> None:
        """Replaces all observations; where they begin with the earlier ones, trains on with the rest."""
        before = (self.features, self._scores, self._variance)
        super().fit(features, scores, variance)
        now = (self.features, self._scores, self._variance)
        first = len(before[1])
        if not all(np.array_equal(old, new[:first]) for old, new in zip(before, now, strict=True)):
            first = 0
            self._restart()
        for i in range(first, len(self._scores)):
            self._learn(i)

    def _learn(self, newest: int) -> None:
        """Trains on an observation and on earlier ones, once its prequential error is noted."""
        rows, scores = self.features[: newest + 1], self._scores[: newest + 1]
        _, location, spread, _ = standardise(scores[:-1])
        predicted = location + spread * self._network(rows[-1:])[0]
        has_scale = newest > 1 and np.ptp(scores[:-1]) > 0  # without one, the prediction has no units
        targets, location, spread, doubt = standardise(scores)
        weights = 1 / (1 + self._variance[: newest + 1] / spread**2 + doubt)
        if has_scale:
            error = np.sqrt(weights[-1]) * (location + spread * targets[-1] - predicted)
            self._errors = np.append(self._errors, error)[-_WINDOW:]
        rng = np.random.default_rng([self._seed, newest])
        for _ in range(_STEPS):
            batch = np.append(rng.choice(newest, min(newest, BATCH - 1), replace=False), newest)
            self._network.step(rows[batch], targets[batch], weights[batch])

    @property
    def _standardised(self) -> Standardised:
        return standardise(self._scores)

    @property
    def noise(self) -> float:
        """Root mean square of the prequential errors, in score units: noise, and signal that was not yet learned."""
        squares = (_WIDE * self.spread) ** 2 + (self._errors**2).sum()
        return float(np.sqrt(squares / (1 + len(self._errors))))

    def predict(self, ranks: ArrayLike, points: ArrayLike | None = None) -> tuple[Array, Array]:
        """Returns mean and standard deviation of a trial's score, noise included, each (n,), in score units."""
        location, spread = self._standardised.location, self.spread
        mean = self._sign * (location + spread * self._network(self.encode(ranks, points)))
        return mean, np.full(len(mean), self.noise)

    def predict_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the gain over the uniform configuration, each (n,), in score units."""
        rows, reference = self.encode(ranks), self.encode(self.grid.reference)
        gain = self.spread * (self._network(rows) - self._network(reference))
        differs = (rows != reference).any(1)
        return gain, np.where(differs, np.sqrt(2) * self.noise, 0)

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that ``tensors`` does not hold, JSON-able."""
        return {**super().settings, "hidden": self._start.sizes[1:-1], "seed": self._seed}

    @property
    def tensors(self) -> dict[str, Array]:
        """The arrays on which predictions and further updates rest, by name, for a file."""
        return {
            **super().tensors,
            "network.start": self._start.parameters,
            "network.parameters": self._network.parameters,
            "network.moments": self._network.moments,
            "network.n_steps": np.asarray([self._network.n_steps], dtype=np.float64),
            "errors": self._errors,
        }

    def restore(self, tensors: Mapping[str, Array]) -> None:
        """Sets observations and network to those of a model with these ``tensors``; see ``ModelBase.restore``."""
        super().restore(tensors)
        start, parameters, moments = (tensors[f"network.{name}"] for name in ("start", "parameters", "moments"))
        if {start.shape, parameters.shape, moments.shape[1:]} != {self._start.parameters.shape}:
            raise ValueError(f"{parameters.shape} parameters, expected {self._start.parameters.shape}")
        self._start.parameters, self._network.parameters, self._network.moments = start, parameters, moments
        self._network.n_steps = int(tensors["network.n_steps"][0])
        self._errors = tensors["errors"]


def network_inputs(grid: RankGrid, ranks: Array) -> Array:
    """Returns ranks scaled linearly so that the grid's candidates span [-1, 1], (n, L)."""
    scaled: Array = (2 * ranks - grid.low - grid.high) / max(grid.high - grid.low, 1e-9)
    return scaled
