from __future__ import annotations

import pytest


@pytest.fixture
def settings(texts):
    """Arguments of prune() that suit the tiny model."""
    return {"calibration": texts, "multiple_of": 8, "n_samples": 4, "sample_length": 32}
