"""Gradients of the calibration loss, block by block, so that the device holds those of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from rankadaptor_optuna.pruning.streaming import BlockStream

Progress = Callable[[int, int], None]
Visit = Callable[[int, "dict[str, Gradient]"], None]


@dataclass
class Gradient:
    """Gradient of one parameter over the samples, in float32.

    Attributes:
        mean: Mean of the samples' gradients: the gradient of the mean loss.
        mean_square: Mean of the samples' squared gradients; zeros unless requested.
    """

    mean: torch.Tensor
    mean_square: torch.Tensor


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode with gradients enabled but not required; restores its flags on exit."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


class Gradients:
    """The backward pass of the mean calibration loss, one block at a time, from the last to the first.

    The forward pass keeps the inputs of each block on the CPU; the backward pass runs each block again. Sums equal
    those of an ordinary backward pass up to rounding.

    Args:
        stream: The blocks of a model in `evaluation_mode`.
        squares: Whether to compute `Gradient.mean_square` too.
        progress: Called with (blocks done, blocks in all).
    """

    def __init__(self, stream: BlockStream, *, squares: bool = False, progress: Progress | None = None) -> None:
        self._stream, self._squares, self._progress = stream, squares, progress

    def walk(
        self, wanted: Mapping[int, Sequence[str]], visit: Visit, *, ends: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        """Calls `visit` with the gradients of each block in turn, then drops them.

        Args:
            wanted: By block index, the names within the block of the parameters to differentiate.
            visit: Called with a block's index and its gradients by name, from the last block to the first.
            ends: Final norm, head and embedding, by name, to visit too: norm and head before the last block, under its
                index plus 1; the embedding after the first block, under -1. Its gradient is that of its use as an
                input alone, even if it is tied to the head. Default: none.

        Raises:
            ValueError: A gradient is not finite.
        """
        stream, last = self._stream, len(self._stream.layers)
        first = 0 if ends else min(wanted)
        states = self._forward()
        outer = {name: p for name, p in (ends or {}).items() if "embed" not in name}
        out_grads, totals = self._backward(None, outer, states.pop(), None)
        if outer:
            visit(last, totals)
        for index in range(last - 1, first - 1, -1):
            named = {name: stream.layers[index].get_parameter(name) for name in wanted.get(index, ())}
            out_grads, totals = self._backward(partial(stream.run, index), named, states.pop(), out_grads)
            if named:
                visit(index, totals)
            if self._progress is not None:
                self._progress(last - index, last - first)
        for name in (ends or {}).keys() - outer.keys():
            visit(-1, {name: self._embedding_gradient(ends[name], out_grads)})  # type: ignore[index]

    def _forward(self) -> list[list[torch.Tensor]]:
        """Returns the inputs of each block and the outputs of the last, by sample."""
        with torch.no_grad():
            states = [self._stream.embed()]
        for index in range(len(self._stream.layers)):
            states.append(self._stream.advance(index, states[-1]))
        return states

    def _backward(
        self,
        function: Callable[[torch.Tensor], torch.Tensor] | None,
        parameters: Mapping[str, nn.Parameter],
        inputs: Sequence[torch.Tensor],
        out_grads: Sequence[torch.Tensor] | None,
    ) -> tuple[list[torch.Tensor], dict[str, Gradient]]:
        """Differentiates one function of the hidden states.

        Args:
            function: A block; None stands for the loss.
            parameters: Its parameters to differentiate.
            inputs: Its inputs, by sample.
            out_grads: Gradients of its outputs, by sample; None for the loss.

        Returns:
            (gradients of the inputs by sample, gradients of the parameters by name).
        """
        totals = {name: _zeros(parameter, self._squares) for name, parameter in parameters.items()}
        in_grads = []
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for sample, hidden in enumerate(inputs):
            hidden.requires_grad_(True)
            out = self._stream.loss(sample, hidden) if function is None else function(hidden)
            out_grad = None if out_grads is None else out_grads[sample].to(out.device)
            in_grad, *grads = torch.autograd.grad(out, [hidden, *parameters.values()], out_grad)
            in_grads.append(in_grad)
            for total, grad in zip(totals.values(), grads, strict=True):
                self._add(total, grad, len(inputs))
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            if not (totals[name].mean.isfinite().all() and totals[name].mean_square.isfinite().all()):
                raise ValueError(
                    f"the calibration loss has gradients that are not finite in {parameter.dtype}: "
                    "load the model with dtype=torch.bfloat16 or torch.float32"
                )
        return in_grads, totals

    def _add(self, total: Gradient, grad: torch.Tensor, n_samples: int) -> None:
        total.mean += grad.float() / n_samples
        if self._squares:
            total.mean_square += grad.float().square() / n_samples

    def _embedding_gradient(self, weight: torch.Tensor, out_grads: Sequence[torch.Tensor]) -> Gradient:
        total = _zeros(weight, self._squares)
        for ids, hidden in zip(self._stream.samples.to(weight.device), out_grads, strict=True):
            grad = torch.zeros_like(total.mean).index_add_(0, ids, hidden[0].to(weight.device).float())
            self._add(total, grad, len(out_grads))
        return total


def _zeros(parameter: torch.Tensor, squares: bool) -> Gradient:
    zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    return Gradient(zeros, zeros.clone() if squares else zeros.new_zeros(()))
