"""What all commands share: their options, their statistics, and the table that they print and write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"
FRESH = (101, 102, 103)  # seeds of recoveries that no search has seen


def command_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Returns a parser with ``--quick``, described by the first line of a module's docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}: shows that it runs, writes NAME_part.json")
    return parser


def selected(parser: argparse.ArgumentParser, kind: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Returns the names that were asked for; ends the command where one is unknown."""
    if unknown := sorted(set(names) - {*(known := list(known))}):
        parser.error(f"no {kind} named {', '.join(unknown)}; there are {', '.join(known)}")
    return list(names)


def set_up() -> None:
    """Silences Optuna and sets torch to one thread, with which tensors as small as the tasks' are faster."""
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)


def check(value: float, goal: str) -> dict[str, Any]:
    """Returns a value beside a goal such as "<= 0.6", met or not."""
    sign, bound = goal.split()
    ok = value <= float(bound) if sign == "<=" else value >= float(bound)
    return {"value": round(float(value), 4), "goal": goal, "ok": bool(ok)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95% t interval; NaN for the width of a single value."""
    from scipy import stats

    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return float(np.mean(values)), half


def cell(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Formats mean and 95% interval as "0.123 ±0.045"; ``sign`` "+" shows the sign of the mean."""
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ±{half:.{digits}f}")


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
    part: bool = False,
    **more: object,
) -> None:
    """Prints the checks and writes results/NAME.json, or NAME_part.json for a part of the measurement."""
    for goal, found in checks.items():
        print(f"{'met   ' if found['ok'] else 'MISSED'}  {goal}: {found['value']:g}, goal {found['goal']}")
    packages = {package: version(package) for package in ("optuna", "torch", "numpy")}
    environment = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    report = {
        "command": _command(),
        "environment": {**environment, **packages},
        "seeds": seeds,
        "rows": list(rows),
        "checks": dict(checks),
        **more,
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}{'_part' if part else ''}.json").write_text(json.dumps(report, indent=1) + "\n")


def _command() -> str:
    """Returns the command as it was typed, without ``--folder``, which differs by machine."""
    spec, arguments = sys.modules["__main__"].__spec__, list(sys.argv[1:])
    if "--folder" in arguments:
        at = arguments.index("--folder")
        del arguments[at : at + 2]
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return " ".join(["python", "-m", module, *arguments])
