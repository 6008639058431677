"""Every short example as its reader runs it: as it is, in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("drop_in", "and 20 more with RankAdaptorSampler"),
        ("plain_peft", "LoraConfig arguments: {"),
        ("trainer", "learning rate = "),
    ],
)
def test_it_runs_as_it_is(name: str, says: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
