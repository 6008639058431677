"""Memory of a recovery: its peak, and freeing what a failed recovery left."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def peak_memory(device: Any, report: Callable[[str, int], None]) -> Iterator[None]:  # noqa: ANN401
    """Reports the peak memory of a context in MiB, also where it raises.

    Args:
        device: The model's ``torch.device``.
        report: Called at the end with ``"peak_gpu_mib"`` and the most memory allocated on a GPU during the context, or,
            elsewhere, with ``"peak_rss_mib"`` and the largest resident set of the process so far; not called where the
            system does not provide it (Windows).
    """
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        if on_gpu:
            report("peak_gpu_mib", round(torch.cuda.max_memory_allocated(device) / 2**20))
        elif (peak := _peak_resident_set()) is not None:
            report("peak_rss_mib", round(peak / 2**20))


def _peak_resident_set() -> int | None:
    """Returns the largest resident set of the process so far in bytes; None where the system does not provide it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> None:
    """Frees the memory of a failed recovery: its graph has reference cycles, and torch caches GPU memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
