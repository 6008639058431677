from __future__ import annotations

import pytest
import torch


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def settings(texts):
    """Arguments of prune() that suit the tiny model."""
    return {"calibration": texts, "multiple_of": 8, "n_samples": 4, "sample_length": 32}
