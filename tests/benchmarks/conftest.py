from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def importable():
    """The benchmarks can be imported, as they import each other."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield
    sys.path.pop(0)
