"""Losses, sensitivities and trials of a benchmark, kept in small CSV files so that a stopped run goes on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.ranks import Ranks

_COLUMNS = ("seed", "part", "ranks", "loss")
_PARTS = ("search", "report")
_TOLERANCE = 1e-4  # nats; set by hand: rounding depends on which configurations are recovered together, far below this
_AT_ONCE = 64  # recoveries between two writes


class Task(Protocol):
    """A task that a race runs on."""

    space: RankSpace

    def losses(
        self, configurations: Sequence[Mapping[Any, int]], seed: Sequence[int], *, report: bool = False
    ) -> list[float]:
        """Returns the losses of configurations, each with its seed."""


@runtime_checkable
class SensitiveTask(Task, Protocol):
    """A task that also knows how sensitive its loss is to each layer's adapter."""

    def sensitivity(self, seed: int) -> dict[Any, float]:
        """Returns the sensitivity of each searched layer after a recovery of this seed with uniform ranks."""


def _read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _append(file: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    is_new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerows([columns] if is_new else [])
        writer.writerows(rows)


class Losses:
    """Losses of a task, each configuration and seed computed once.

    Args:
        task: The task that computes them.
        file: The CSV file that keeps them; made on the first loss.

    Raises:
        ValueError: The file's first loss is not the task's: another machine trained another model, or the task has
            changed.
    """

    def __init__(self, task: Task, file: Path) -> None:
        self._task, self._file = task, file
        self._known = {(int(r["seed"]), r["part"], r["ranks"]): float(r["loss"]) for r in _read(file)}
        self.n_computed = 0
        for (seed, part, ranks), loss in list(self._known.items())[:1]:
            configuration = Ranks(zip(task.space.layers, map(int, ranks.split()), strict=True))
            now = task.losses([configuration], [seed], report=part == "report")[0]
            if abs(now - loss) > _TOLERANCE:
                raise ValueError(
                    f"{file} has the loss {loss} of ranks {ranks}, this machine measures {now}; move the file away."
                )

    def __call__(self, asked: Sequence[tuple[Mapping[Any, int], int]], *, report: bool = False) -> list[float]:
        """Returns the losses of configurations with seeds, in their order."""
        keys = [(seed, _PARTS[report], " ".join(map(str, ranks.values()))) for ranks, seed in asked]
        missing = list({key: one for key, one in zip(keys, asked, strict=True) if key not in self._known}.items())
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            losses = self._task.losses([r for _, (r, _) in some], [seed for _, (_, seed) in some], report=report)
            found = {key: loss for (key, _), loss in zip(some, losses, strict=True)}
            _append(self._file, _COLUMNS, [(*key, loss) for key, loss in found.items()])
            self._known |= found
            self.n_computed += len(found)
        return [self._known[key] for key in keys]


class Sensitivities:
    """Sensitivities of a task's layers, those of each seed computed once.

    Args:
        task: The task that computes them.
        file: The CSV file that keeps them; made with the first ones.
    """

    def __init__(self, task: SensitiveTask, file: Path) -> None:
        self._task, self._file = task, file
        self._known = {int(r["seed"]): list(map(float, r["layers"].split())) for r in _read(file)}

    def __call__(self, seed: int) -> dict[str, float]:
        """Returns the sensitivity by rank parameter, as a study keeps it."""
        if seed not in self._known:
            self._known[seed] = [float(f"{value:.6g}") for value in self._task.sensitivity(seed).values()]
            _append(self._file, ("seed", "layers"), [(seed, " ".join(map(str, self._known[seed])))])
        return dict(zip(self._task.space.distributions(), self._known[seed], strict=True))


class Trials:
    """The trials of finished searches, so that a table is made again without asking a sampler.

    Args:
        file: The CSV file that keeps sampler, seed and parameters of each trial, in order.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[tuple[str, int], list[list[int]]] = {}
        for row in _read(file):
            self._known.setdefault((row["who"], int(row["seed"])), []).append(list(map(int, row["params"].split())))

    def of(self, who: str, seed: int) -> list[list[int]]:
        """Returns the parameters of a search's trials, in the order of the layers."""
        return self._known.get((who, seed), [])

    def put(self, searches: Mapping[tuple[str, int], Sequence[Sequence[int]]]) -> None:
        """Writes the trials of searches, which replace earlier ones of the same sampler and seed."""
        self._known |= {key: [list(params) for params in trials] for key, trials in searches.items()}
        part = self._file.with_suffix(".part")
        part.unlink(missing_ok=True)
        rows = [(*key, " ".join(map(str, params))) for key, trials in self._known.items() for params in trials]
        _append(part, ("who", "seed", "params"), rows)
        part.replace(self._file)
