from __future__ import annotations

import pytest
import torch


@pytest.fixture
def blocks():
    """Five blocks of ids that repeat with a period, so that there is something to learn."""
    offsets = torch.tensor([[0], [3], [6], [9], [12]])
    return (torch.arange(24) % 7 * 11 + offsets) % 256
