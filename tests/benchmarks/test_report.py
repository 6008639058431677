from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import report


def test_a_goal_is_met_at_its_bound():
    assert report.check(0.60004, ">= 0.6") == {"value": 0.6, "goal": ">= 0.6", "ok": True}
    assert not report.check(0.60004, "<= 0.6")["ok"]
    assert report.check(0.6, "<= 0.6")["ok"]


def test_an_interval_is_students():
    mean, half = report.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.3027 * np.std([1, 2, 4], ddof=1) / 3**0.5, rel=1e-4)
    assert report.cell([1.0, 2.0, 4.0], 2, "+") == f"+2.33 ±{half:.2f}"
    assert report.cell([0.5]) == "0.500"


def test_results_name_their_command_without_the_machines_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "benchmarks.race.__main__"}))
    monkeypatch.setattr(sys, "argv", ["race", "--seeds", "2", "--folder", "/somewhere", "docs-rough"])
    checks = {"small": report.check(2, "<= 1")}
    report.write("race", [{"a": 1}], checks, seeds=[0], part=True, more="details")
    found = json.loads((tmp_path / "race_part.json").read_text())
    assert found.pop("environment").keys() >= {"python", "machine", "cores", "torch"}
    assert found == {
        "command": "python -m benchmarks.race --seeds 2 docs-rough",
        "seeds": [0],
        "rows": [{"a": 1}],
        "checks": checks,
        "more": "details",
    }
