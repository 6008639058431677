"""Losses that a benchmark has measured, and the trials that led to them, in small files so that runs add up."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rankadaptor_optuna import RankSpace

Ranks = Mapping[int, int]
_COLUMNS = ("seed", "part", "ranks", "loss")
_PARTS = ("search", "report")
_SAME = 1e-4  # rounding differs with what is recovered together, by far less


class Task(Protocol):
    """What a race needs of a task."""

    space: RankSpace

    def losses(self, configurations: Sequence[Ranks], seed: Sequence[int], *, report: bool = False) -> list[float]:
        """Losses of configurations, each with its seed."""


class Losses:
    """Losses of a task, each configuration and seed computed once and kept in a CSV file.

    Args:
        task: What computes them.
        file: Where they are kept; made on the first loss.

    Raises:
        ValueError: The file's first loss is not what the task gives: another machine trained another model, or the task
            has changed.
    """

    def __init__(self, task: Task, file: Path) -> None:
        self._task, self._file = task, file
        self._known: dict[tuple[int, str, str], float] = {}
        self.n_computed = 0
        if not file.exists():
            return
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                self._known[int(row["seed"]), row["part"], row["ranks"]] = float(row["loss"])
        for (seed, part, ranks), loss in list(self._known.items())[:1]:
            configuration = dict(zip(task.space.layers, map(int, ranks.split()), strict=True))
            now = task.losses([configuration], [seed], report=part == "report")[0]
            if abs(now - loss) > _SAME:
                raise ValueError(
                    f"{file} has the loss {loss} of {ranks} where this machine measures {now}; move it away."
                )

    def __call__(self, asked: Sequence[tuple[Ranks, int]], *, report: bool = False) -> list[float]:
        """Losses of configurations with seeds, in their order."""
        keys = [(seed, _PARTS[report], " ".join(map(str, ranks.values()))) for ranks, seed in asked]
        missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in self._known}
        for start in range(0, len(missing), 64):
            some = list(missing.items())[start : start + 64]
            losses = self._task.losses(
                [ranks for _, (ranks, _) in some], [seed for _, (_, seed) in some], report=report
            )
            found = dict(zip((key for key, _ in some), losses, strict=True))
            is_new = not self._file.exists()
            with self._file.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([_COLUMNS] if is_new else [])
                writer.writerows([*key, loss] for key, loss in found.items())
            self._known |= found
            self.n_computed += len(found)
        return [self._known[key] for key in keys]


class SensitiveTask(Task, Protocol):
    """A task that also tells how sensitive its loss is to each layer's adapter."""

    def sensitivity(self, seed: int) -> dict[int, float]:
        """By searched layer, after a recovery of this seed with uniform ranks."""


class Sensitivities:
    """Sensitivities of a task's layers, of each seed computed once and kept in a CSV file.

    Args:
        task: What computes them.
        file: Where they are kept; made with the first ones.
    """

    def __init__(self, task: SensitiveTask, file: Path) -> None:
        self._task, self._file = task, file
        self._known: dict[int, list[float]] = {}
        if file.exists():
            with file.open(newline="") as lines:
                self._known = {int(r["seed"]): list(map(float, r["layers"].split())) for r in csv.DictReader(lines)}

    def __call__(self, seed: int) -> dict[str, float]:
        """As a study keeps them, by rank parameter."""
        if seed not in self._known:
            self._known[seed] = [float(f"{value:.6g}") for value in self._task.sensitivity(seed).values()]
            is_new = not self._file.exists()
            with self._file.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([("seed", "layers")] if is_new else [])
                writer.writerow((seed, " ".join(map(str, self._known[seed]))))
        return dict(zip(self._task.space.distributions(), self._known[seed], strict=True))


class Trials:
    """What samplers proposed in their studies of a task, kept in a CSV file: sampler, seed and parameters, in order.

    Replaying a search would do, were it not for samplers that a rounding error turns elsewhere on another machine.

    Args:
        file: Where they are kept; made with the first trial.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[tuple[str, int], list[list[int]]] = {}
        if file.exists():
            with file.open(newline="") as lines:
                for row in csv.DictReader(lines):
                    params = list(map(int, row["params"].split()))
                    self._known.setdefault((row["who"], int(row["seed"])), []).append(params)

    def of(self, who: str, seed: int) -> list[list[int]]:
        """A study's trials so far: the parameters of each, in the order of the layers."""
        return self._known.get((who, seed), [])

    def add(self, trials: Mapping[tuple[str, int], Sequence[int]]) -> None:
        """Writes down one more trial of some studies."""
        self._append(self._file, {key: [params] for key, params in trials.items()})
        for key, params in trials.items():
            self._known.setdefault(key, []).append(list(params))

    def put(self, who: str, seed: int, trials: Sequence[Sequence[int]]) -> None:
        """Writes down a whole study's trials, instead of those that there were."""
        self._known[who, seed] = [list(params) for params in trials]
        part = self._file.with_suffix(".part")
        part.unlink(missing_ok=True)
        self._append(part, self._known)
        part.replace(self._file)

    @staticmethod
    def _append(path: Path, trials: Mapping[tuple[str, int], Sequence[Sequence[int]]]) -> None:
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("who", "seed", "params")] if is_new else [])
            writer.writerows([*key, " ".join(map(str, params))] for key, rows in trials.items() for params in rows)
