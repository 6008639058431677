"""What every benchmark prints and writes."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"


def check(value: float, goal: str) -> dict[str, Any]:
    """A goal such as "<= 0.6", met or not."""
    sign, bound = goal.split()
    ok = value <= float(bound) if sign == "<=" else value >= float(bound)
    return {"value": round(float(value), 4), "goal": goal, "ok": bool(ok)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t interval."""
    from scipy import stats

    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return float(np.mean(values)), half


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    checks: Mapping[str, Mapping[str, Any]],
    *,
    seeds: object,
    **more: object,
) -> None:
    """Writes results/NAME.json and prints the checks."""
    for what, found in checks.items():
        print(f"{'met   ' if found['ok'] else 'MISSED'}  {what}: {found['value']:g}, goal {found['goal']}")
    packages = {package: version(package) for package in ("optuna", "torch", "numpy")}
    environment = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    arguments = list(sys.argv[1:])
    if "--folder" in arguments:  # where the machine that ran it keeps its studies says nothing to others
        at = arguments.index("--folder")
        del arguments[at : at + 2]
    spec = sys.modules["__main__"].__spec__
    command = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
    report = {
        "command": " ".join(["python", "-m", command, *arguments]),
        "environment": {**environment, **packages},
        "seeds": seeds,
        "rows": list(rows),
        "checks": dict(checks),
        **more,
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
