"""The paper's own performance model, for comparison: an MLP on the rank vector, trained by gradient steps."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.model import Belief, PerformanceModel
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.statistics import Standardised, standardise

if TYPE_CHECKING:
    from rankadaptor_optuna.space import RankSpace

HIDDEN = (32, 32, 32)
_LEARNING_RATE = 1e-3
BATCH = 16
_STEPS = 10
_WINDOW = 30  # prequential errors that count: the earliest ones are of a network that knew nothing
_WIDE = 2.0  # standard deviation before there are any, in spreads of the scores


class Network:
    """The MLP, and Adam's state. NumPy in double precision: whatever torch's defaults are, it computes the same.

    Args:
        width: Number of inputs: one rank a layer.
        hidden: Widths of the three hidden layers.
        seed: Seed of the initialisation.

    Attributes:
        parameters: All weights and biases, (P,).
        moments: Adam's running mean of the gradient and of its square, (2, P).
        n_steps: Adam's step count.

    Raises:
        ValueError: ``hidden`` is not three positive widths.
    """

    def __init__(self, width: int, hidden: Sequence[int] = HIDDEN, seed: int = 0) -> None:
        if (
            not isinstance(hidden, Sequence)
            or len(hidden) != 3
            or not all(isinstance(n, int) and n > 0 for n in hidden)
        ):
            raise ValueError(f"hidden must be three positive widths such as {HIDDEN}, got {hidden!r}.")
        self.sizes = [width, *hidden, 1]
        rng = np.random.default_rng(seed)
        bounds = [np.full((n + 1) * m, max(1, n) ** -0.5) for n, m in itertools.pairwise(self.sizes)]
        self.parameters: Array = np.concatenate(bounds)
        self.parameters *= rng.uniform(-1, 1, self.parameters.shape)
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """Forgets Adam's state, for a new task."""
        self.moments: Array = np.zeros((2, len(self.parameters)))
        self.n_steps = 0

    def copy(self) -> Network:
        """The same network, to be trained apart."""
        twin = Network.__new__(Network)
        twin.sizes, twin.n_steps = self.sizes, self.n_steps
        twin.parameters, twin.moments = self.parameters.copy(), self.moments.copy()
        return twin

    def _layers(self, flat: Array) -> Iterator[tuple[Array, Array]]:
        """Weight (in, out) and bias (out,) of each layer, as views."""
        start = 0
        for n, m in itertools.pairwise(self.sizes):
            yield flat[start : start + n * m].reshape(n, m), flat[start + n * m : start + (n + 1) * m]
            start += (n + 1) * m

    def _forward(self, inputs: Array) -> list[Array]:
        """Inputs of each layer, and the last one's output."""
        *hidden, (weight, bias) = self._layers(self.parameters)
        flow = [inputs]
        for inner, shift in hidden:
            flow.append(np.maximum(flow[-1] @ inner + shift, 0))
        return [*flow, flow[-1] @ weight + bias]

    def __call__(self, inputs: Array) -> Array:
        """Predicted scores, (n,), of inputs (n, width)."""
        return self._forward(inputs)[-1][:, 0]

    def step(self, inputs: Array, targets: Array, weights: Array | float = 1.0) -> None:
        """One step of Adam (Kingma & Ba, 2015) on the mean of weight x squared error (equation 5)."""
        *flow, out = self._forward(inputs)
        gradient = np.empty_like(self.parameters)
        delta = (2 / len(inputs) * weights * (out[:, 0] - targets))[:, None]
        both = zip(flow, self._layers(self.parameters), self._layers(gradient), strict=True)
        for entered, (weight, _), (weight_gradient, bias_gradient) in reversed(list(both)):
            weight_gradient[:], bias_gradient[:] = entered.T @ delta, delta.sum(0)
            delta = (delta @ weight.T) * (entered > 0)
        self.n_steps += 1
        self.moments[0] += 0.1 * (gradient - self.moments[0])
        self.moments[1] += 0.001 * (gradient**2 - self.moments[1])
        mean, square = self.moments[0] / (1 - 0.9**self.n_steps), self.moments[1] / (1 - 0.999**self.n_steps)
        self.parameters -= _LEARNING_RATE * mean / (np.sqrt(square) + 1e-8)


class PaperModel(PerformanceModel):
    """The paper's performance model (section 3.2): an MLP l-32-32-32-1 on the rank vector, trained online.

    From the paper: the rank vector as input, three hidden layers (32-32-32, or 32-64-32 and 32-16-32 in its ablation),
    a linear scalar output, the squared error (equation 5), offline meta-learning and online incremental learning.
    Chosen here, as the most usual: ranks scaled linearly to [-1, 1] over the candidates; ReLU; uniform initialisation
    within ±1/sqrt(inputs), torch's default; Adam at 1e-3 in both phases; 10 steps for each new trial, on it and up to
    15 earlier ones drawn anew each step; scores standardised within the study so far. The network has no uncertainty
    of its own: the standard deviation is the root mean square of its latest 30 prequential errors (each score was
    predicted before it was trained on), together with one of twice the scores' spread, which is all there is at first.
    It includes the trials' noise.

    Args:
        space: The rank space (or a ``RankGrid`` of searched layers).
        prior: What ``pretrain`` or ``reptile`` returned. Default (``"pretrained"``) and None: untrained, as none fits
            every depth.
        direction: ``"maximize"`` or ``"minimize"``.
        n_ordinary: Width of the other parameters' points; they join the rank vector.
        mode: ``"paper"``.
        hidden: Widths of the three hidden layers.
        seed: Seed of initialisation and training. The same seed and history give the same predictions, however the
            trials are divided into updates.

    Raises:
        ValueError: The prior is none of these or of another shape, or the direction or ``hidden`` is unknown.
    """

    mode = "paper"

    def __init__(
        self,
        space: RankSpace | RankGrid,
        *,
        prior: Prior | Network | str | os.PathLike[str] | None = "pretrained",
        hidden: Sequence[int] = HIDDEN,
        seed: int = 0,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(space, prior=None, **{"mode": self.mode, **settings})
        self._seed = int(seed)
        start = Network(self._width, hidden, seed)
        if isinstance(prior, Network):
            if prior.sizes != start.sizes:
                raise ValueError(f"the prior is a network {prior.sizes}, this performance model needs {start.sizes}.")
            start = prior
        elif prior not in (None, "pretrained"):
            raise ValueError(f"in paper mode a prior is None or what pretrain or reptile returns, got {prior!r}.")
        self._start = start
        self._restart()

    def _restart(self) -> None:
        self._network = self._start.copy()
        self._errors: Array = np.zeros(0)

    @property
    def _width(self) -> int:
        return self.grid.n_layers + self._n_ordinary

    def _rows(self, ranks: Array, points: Array) -> Array:
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
        rows, scores = self.features[: newest + 1], self._scores[: newest + 1]
        _, location, spread, _ = standardise(scores[:-1])
        predicted = location + spread * self._network(rows[-1:])[0]
        has_scale = newest > 1 and np.ptp(scores[:-1]) > 0  # else the prediction was in no units
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
        """Root mean square of the prequential errors, in the scores' own units: noise and what was not yet learned."""
        squares = (_WIDE * self.spread) ** 2 + (self._errors**2).sum()
        return float(np.sqrt(squares / (1 + len(self._errors))))

    def predict(self, ranks: ArrayLike, points: ArrayLike | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation of a trial's score, each (n,), in the scores' own units."""
        location, spread = self._standardised.location, self.spread
        mean = self._sign * (location + spread * self._network(self.encode(ranks, points)))
        return mean, np.full(len(mean), self.noise)

    def predict_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Mean and standard deviation of how much better than the uniform configuration, each (n,), in score units."""
        rows, reference = self.encode(ranks), self.encode(self.grid.reference)
        gain = self.spread * (self._network(rows) - self._network(reference))
        differs = (rows != reference).any(1)
        return gain, np.where(differs, np.sqrt(2) * self.noise, 0)

    def predict_lasting_gain(self, ranks: ArrayLike) -> tuple[Array, Array]:
        """Not in paper mode.

        Raises:
            ValueError: Always.
        """
        raise _no_tables("predict_lasting_gain")

    def sample(self, rng: np.random.Generator) -> Belief:
        """Not in paper mode.

        Raises:
            ValueError: Always.
        """
        raise _no_tables("sample")

    def mean(self) -> Belief:
        """Not in paper mode.

        Raises:
            ValueError: Always.
        """
        raise _no_tables("mean")

    def constraint(self, features: Array, values: Array) -> Belief:
        """Not in paper mode.

        Raises:
            ValueError: Always.
        """
        raise _no_tables("constraint")

    def _settings(self) -> dict[str, Any]:
        return {"hidden": self._start.sizes[1:-1], "seed": self._seed}

    def _tensors(self) -> dict[str, Array]:
        return {
            **super()._tensors(),
            "network.start": self._start.parameters,
            "network.parameters": self._network.parameters,
            "network.moments": self._network.moments,
            "network.n_steps": np.asarray([self._network.n_steps], dtype=np.float64),
            "errors": self._errors,
        }

    def _restore(self, tensors: Mapping[str, Array]) -> None:
        super()._restore(tensors)
        start, parameters, moments = (tensors[f"network.{name}"] for name in ("start", "parameters", "moments"))
        if {start.shape, parameters.shape, moments.shape[1:]} != {self._start.parameters.shape}:
            raise ValueError(f"{parameters.shape} parameters, expected {self._start.parameters.shape}")
        self._start.parameters, self._network.parameters, self._network.moments = start, parameters, moments
        self._network.n_steps = int(tensors["network.n_steps"][0])
        self._errors = tensors["errors"]


def network_inputs(grid: RankGrid, ranks: Array) -> Array:
    """Ranks scaled linearly so that the grid's candidates span [-1, 1], (n, L)."""
    scaled: Array = (2 * ranks - grid.low - grid.high) / max(grid.high - grid.low, 1e-9)
    return scaled


def _no_tables(method: str) -> ValueError:
    return ValueError(f'{method} needs the Bayesian head, which mode="paper" has not; use predict, or mode="bayesian".')
