from __future__ import annotations

import pytest
import torch


@pytest.fixture
def foreign_torch():
    """Call it to set torch up as another part of a user's program may have; undone after the test."""
    dtype = torch.get_default_dtype()

    def set_up():
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float16)

    yield set_up
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)
