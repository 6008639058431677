"""Several processes, as ``accelerate launch`` or ``torchrun`` start them, that share the batches of one recovery.

The main process asks and tells the study. For each recovery it broadcasts the ranks and the seed; the other processes
attach the same adapter, take their share of every batch, and the gradients are summed. With a single process all
functions here are no-ops.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def join_processes() -> None:
    """Joins the other processes of a launcher, if there are any; to be called before anything is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(timeout=timedelta(days=1))  # the others wait while the main process evaluates; set by hand


def process_index() -> int:
    """Returns this process's index, 0 for the main process."""
    from torch import distributed

    return distributed.get_rank() if _is_distributed() else 0


def n_processes() -> int:
    """Returns the number of processes that share a recovery."""
    from torch import distributed

    return distributed.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def main_first() -> Iterator[None]:
    """Lets the main process run the context before the others."""
    from torch import distributed

    several, index = n_processes() > 1, process_index()
    if several and index:
        distributed.barrier()
    try:
        yield
    finally:
        if several and not index:
            distributed.barrier()


def broadcast(numbers: Sequence[int], device: Any) -> list[int]:  # noqa: ANN401
    """Returns the main process's numbers on all processes; each must pass as many numbers."""
    import torch

    if n_processes() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.long, device=device)
    torch.distributed.broadcast(tensor, src=0)
    return [int(number) for number in tensor.tolist()]


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Sums each tensor over the processes, in place, on all of them."""
    from torch import distributed

    if n_processes() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def shared_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Returns the gradients to sum over the processes: zeros for a process without a share of the batch.

    With a single process there is nothing to sum and the list is empty.
    """
    import torch

    if n_processes() == 1:
        return []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@contextmanager
def fail_together(device: Any) -> Iterator[None]:  # noqa: ANN401
    """Fails on every process if the context fails on one, so that none waits for gradients that never come.

    Raises:
        RuntimeError: The context failed on another process, which raises its own error.
    """
    import torch

    if n_processes() == 1:
        yield
        return
    failed = torch.zeros(1, device=device)
    try:
        yield
    except BaseException:
        sum_over_processes([failed.fill_(1)])
        raise
    sum_over_processes([failed])
    if failed:
        raise RuntimeError("another process of this recovery failed.")
