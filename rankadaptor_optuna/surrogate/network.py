"""The network of the paper's performance model, and Adam, in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from rankadaptor_optuna.surrogate.grid import Array

HIDDEN = (32, 32, 32)  # the paper's implementation details; its Table 3 also tries 32-64-32 and 32-16-32
_LEARNING_RATE = 1e-3  # defaults of Adam (Kingma & Ba, 2015, algorithm 1), like all below
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
_STEP_1, _STEP_2 = 0.1, 0.001  # 1 - beta


class Network:
    """The paper's MLP, width-32-32-32-1, and Adam's state; in double precision, whatever torch's defaults are.

    The paper (section 3.2) gives three hidden layers and a linear scalar output. Chosen here, as the most usual: ReLU,
    and uniform initialisation within ±1/sqrt(inputs), torch's default.

    Args:
        width: Number of inputs.
        hidden: Widths of the three hidden layers.
        seed: Seed of the initialisation.

    Attributes:
        sizes: Widths of all layers, from the inputs to the output.
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
        """Resets Adam's state, for a new task."""
        self.moments: Array = np.zeros((2, len(self.parameters)))
        self.n_steps = 0

    def copy(self) -> Network:
        """Returns an independent copy."""
        twin = Network.__new__(Network)
        twin.sizes, twin.n_steps = self.sizes, self.n_steps
        twin.parameters, twin.moments = self.parameters.copy(), self.moments.copy()
        return twin

    def _layers(self, flat: Array) -> Iterator[tuple[Array, Array]]:
        """Weight (in, out) and bias (out,) of each layer, as views of ``flat`` (P,)."""
        start = 0
        for n, m in itertools.pairwise(self.sizes):
            yield flat[start : start + n * m].reshape(n, m), flat[start + n * m : start + (n + 1) * m]
            start += (n + 1) * m

    def _forward(self, inputs: Array) -> list[Array]:
        """Inputs of each layer, and the last layer's output."""
        *hidden, (weight, bias) = self._layers(self.parameters)
        flow = [inputs]
        for inner, shift in hidden:
            flow.append(np.maximum(flow[-1] @ inner + shift, 0))
        return [*flow, flow[-1] @ weight + bias]

    def __call__(self, inputs: Array) -> Array:
        """Returns the predicted scores, (n,), of inputs (n, width)."""
        return self._forward(inputs)[-1][:, 0]

    def step(self, inputs: Array, targets: Array, weights: Array | float = 1.0) -> None:
        """Takes one step of Adam on the mean of weight x squared error (the paper's equation 5)."""
        *flow, out = self._forward(inputs)
        gradient = np.empty_like(self.parameters)
        delta = (2 / len(inputs) * weights * (out[:, 0] - targets))[:, None]
        both = zip(flow, self._layers(self.parameters), self._layers(gradient), strict=True)
        for entered, (weight, _), (weight_gradient, bias_gradient) in reversed(list(both)):
            weight_gradient[:], bias_gradient[:] = entered.T @ delta, delta.sum(0)
            delta = (delta @ weight.T) * (entered > 0)
        self.n_steps += 1
        self.moments[0] += _STEP_1 * (gradient - self.moments[0])
        self.moments[1] += _STEP_2 * (gradient**2 - self.moments[1])
        mean, square = self.moments[0] / (1 - _BETA_1**self.n_steps), self.moments[1] / (1 - _BETA_2**self.n_steps)
        self.parameters -= _LEARNING_RATE * mean / (np.sqrt(square) + _EPSILON)
