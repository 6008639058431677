"""Several processes, as ``accelerate launch`` or ``torchrun`` start them, that share the batches of one recovery.

The main process asks and tells the study. For each recovery it sends the ranks and the seed to the others, which attach
the same adapter, take their share of every batch and add up the gradients. With one process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def join() -> None:
    """Joins the other processes of a launcher, where there is one; before anything is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(timeout=timedelta(days=1))  # others wait while the main one evaluates


def place() -> tuple[int, int]:
    """This process's number, 0 for the main one, and how many there are."""
    from torch import distributed

    on = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if on else (0, 1)


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the main process through before the others."""
    from torch import distributed

    number, n = place()
    if n > 1 and number:
        distributed.barrier()
    try:
        yield
    finally:
        if n > 1 and not number:
            distributed.barrier()


def sent(numbers: Sequence[int], device: Any) -> list[int]:  # noqa: ANN401
    """The main process's numbers, on all of them; each must call it with as many."""
    import torch

    if place()[1] == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.long, device=device)
    torch.distributed.broadcast(tensor, src=0)
    return [int(number) for number in tensor.tolist()]


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Sums each tensor over the processes, in place, on all of them."""
    from torch import distributed

    if place()[1] > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Their gradients, zeros where a process with no share of a batch has none; none with one process."""
    import torch

    if place()[1] == 1:
        return []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@contextmanager
def together(device: Any) -> Iterator[None]:  # noqa: ANN401
    """Ends on every process where it fails on one, so that none waits for gradients that never come.

    Raises:
        RuntimeError: Another process failed within; that one raises its own error.
    """
    import torch

    if place()[1] == 1:
        yield
        return
    failed = torch.zeros(1, device=device)
    try:
        yield
    except BaseException:
        add_up([failed.fill_(1)])
        raise
    add_up([failed])
    if failed:
        raise RuntimeError("another process of this recovery failed.")
