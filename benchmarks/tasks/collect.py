"""Collect recoveries of many small models as tasks, from which the prior is meta-learned.

    python -m benchmarks.collect_tasks [NAME ...]        # default: all tasks of small models; --list shows the names
    python -m benchmarks.collect_tasks --studies FILE    # write the collected tasks as Optuna studies in a journal

Each task is a byte-level LLaMA (recovery.py; families that the race is not run on), pruned, and recovered a hundred
times: with uniform ranks, with random ones, and with ranks that vary smoothly along the depth. The result is
results/tasks/NAME.csv: a line of JSON with settings, rank space and the layers' sensitivities after the recovery with
uniform ranks, then ranks and loss. A stopped run goes on; several processes may collect different tasks. With
``--studies``, ``optuna-dashboard FILE`` shows the tasks.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from tqdm import tqdm

from benchmarks.report import FOLDER, selected, set_up, show
from benchmarks.tasks.ranks import random_ranks, weighted_ranks
from benchmarks.tasks.recovery import TOGETHER, RecoveryTask, load_task
from benchmarks.tasks.simulated import smooth
from benchmarks.tasks.smollm2 import SMOLLM2, SmolLM2Spec, SmolLM2Task, load_smollm2
from benchmarks.tasks.specs import DAMAGES, Damage, Dense, TaskSpec, settings
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.database.attributes import RECIPE_ATTR, SENSITIVITY_ATTR, SPACE_ATTR
from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.surrogate.grid import Array, RankGrid

TASKS = FOLDER / "tasks"
N_RECOVERIES = 100
SEED = 0  # of all recoveries: rank configurations of a task are compared on one seed, as in a study
_FORMAT = 1
_SHAPES = (  # text, layers, hidden size
    *(("wikitext2", *shape) for shape in ((6, 64), (9, 80), (14, 48), (20, 48))),
    *(("alpaca", *shape) for shape in ((7, 64), (12, 48), (16, 64), (24, 32))),
    *(("docs", *shape) for shape in ((6, 80), (10, 64), (13, 48), (18, 48))),
    *(("questions", *shape) for shape in ((8, 48), (11, 64), (15, 64), (22, 48))),
)
_CANDIDATES = ((2, 4, 6, 8, 10, 12), (0, 4, 8, 16, 32), (2, 4, 8, 16), (1, 2, 4, 8))
_RATIOS = {"taylor": (0.5, 0.6, 0.7), "rough": (0.7, 0.8, 0.9), "even": (0.4, 0.5, 0.6)}


@dataclass(frozen=True)
class Collected:
    """A collected task.

    Attributes:
        task: The task to meta-learn from; tasks of one dense model are a family; its first trial is uniform.
        space: Its rank space.
        spec: Its settings that differ from the defaults.
        pruned_loss: The loss without recovery.
        cpu_seconds: CPU seconds that collecting it took.
    """

    task: MetaTask
    space: RankSpace
    spec: dict[str, Any]
    pruned_loss: float
    cpu_seconds: float

    @property
    def relative(self) -> Array:
        """Losses of the trials, (n,): 0 is the uniform configuration's, 1 the pruned model's."""
        losses: Array = -self.task.scores
        return (losses - losses[0]) / (self.pruned_loss - losses[0])


def specs() -> list[TaskSpec]:
    """Returns the tasks: each model pruned in three ways, other settings drawn from those a user may choose."""
    found = []
    for i, (text, n_layers, hidden) in enumerate(_SHAPES):
        heads = hidden // 16
        kv_heads = 1 if i % 2 else heads
        training = TrainingConfig(steps=1000, batch_size=32, learning_rate=3e-3)
        dense = Dense(text, n_layers, hidden, heads, kv_heads, hidden * 5 // 2 // 16 * 16, training, seed=100 + i)
        rng = np.random.default_rng([11, i])
        for kind in DAMAGES:
            candidates = _CANDIDATES[rng.integers(len(_CANDIDATES))]
            recovery = TrainingConfig(int(rng.choice([16, 24, 40])), 8, float(rng.choice([1e-3, 1.5e-3, 2e-3])))
            ratio = float(rng.choice(_RATIOS[kind]))
            if kind == "taylor" and kv_heads == 1 and hidden < 64:
                ratio = min(ratio, 0.6)  # the only key-value head stays, so 0.7 cannot be reached
            damage = Damage(kind, ratio, seed=100 + i)
            budget = f"uniform:{8 if 8 in candidates[:-1] else 4}"
            found.append(TaskSpec(f"{text}-{n_layers}x{hidden}-{kind}", dense, damage, recovery, candidates, budget))
    return found


def configurations(space: RankSpace, n: int = N_RECOVERIES, seed: int = 0) -> list[Ranks]:
    """Returns uniform ranks, then random and smooth ones in turn; up to ``n``, all different."""
    rng, depth = np.random.default_rng([12, seed]), np.linspace(0, 1, len(space.layers))
    found = {tuple(space.uniform().values()): space.uniform()}
    for attempt in range(50 * n):
        if len(found) == n:
            break
        if attempt % 2:
            ranks = random_ranks(space, rng)
        else:
            tilt = rng.uniform(0.2, 1.5) * smooth(depth, rng)
            ranks = weighted_ranks(space, np.exp(tilt) * np.asarray(space.costs))
        found.setdefault(tuple(ranks.values()), ranks)
    return list(found.values())


def open_task(spec: TaskSpec | SmolLM2Spec, cache: Path | None = None) -> RecoveryTask | SmolLM2Task:
    """Opens a task of a small model, or of SmolLM2-135M."""
    return load_smollm2(spec, cache) if isinstance(spec, SmolLM2Spec) else load_task(spec, cache)


def collect(
    spec: TaskSpec | SmolLM2Spec, folder: Path = TASKS, n: int = N_RECOVERIES, cache: Path | None = None
) -> Path:
    """Runs the recoveries that a task lacks; NAME.csv.part keeps them until all are done.

    Raises:
        ValueError: The folder holds a task of this name with other settings.
    """
    file, part = folder / f"{spec.name}.csv", folder / f"{spec.name}.csv.part"
    head, rows = next((_read(one) for one in (part, file) if one.exists()), ({}, []))
    if head and head["spec"] != settings(spec):
        raise ValueError(f"{file.name} has other settings; move it away to collect the task anew.")
    if len(rows) >= n:
        return file
    start = time.process_time()
    task = open_task(spec, cache)
    wanted, head = configurations(task.space, n), head or _head(spec, task)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(wanted), initial=len(rows), desc=spec.name, leave=False, dynamic_ncols=True) as bar:
        while len(rows) < len(wanted):
            chunk = wanted[len(rows) : len(rows) + TOGETHER]
            rows += [[*ranks.values(), loss] for ranks, loss in zip(chunk, task.losses(chunk, seed=SEED), strict=True)]
            now = time.process_time()
            head["cpu_seconds"], start = round(head["cpu_seconds"] + now - start, 1), now
            write_text(part, _text(head, task.space, rows))
            bar.update(len(chunk))
    if part.exists():
        part.replace(file)
    return file


def collected(folder: Path = TASKS) -> list[Collected]:
    """Returns all tasks that are collected in full, by name."""
    return [read(file) for file in sorted(folder.glob("*.csv"))]


def read(file: Path) -> Collected:
    """Reads a collected task."""
    head, rows = _read(file)
    table, space, spec = np.asarray(rows, dtype=np.float64), RankSpace.from_dict(head["space"]), head["spec"]
    dense = spec.get("dense")
    task = MetaTask(
        grid=replace(RankGrid.from_space(space), sensitivity=np.asarray(head["sensitivity"])),
        ranks=table[:, :-1],
        scores=-table[:, -1],
        name=spec["name"],
        family=f"{dense['text']}-{dense['n_layers']}x{dense['hidden']}" if dense else spec["family"],
    )
    return Collected(task, space, spec, float(head["pruned_loss"]), float(head["cpu_seconds"]))


def add_study(collected: Collected, storage: BaseStorage) -> None:
    """Adds a collected task to a storage as an Optuna study; skips a study that is there."""
    task, space = collected.task, collected.space
    if task.name in optuna.get_all_study_names(storage):
        return
    study = optuna.create_study(storage=storage, study_name=task.name, direction="minimize")
    study.set_user_attr(SPACE_ATTR, space.to_dict())
    study.set_user_attr(RECIPE_ATTR, {"model": task.family, **collected.spec})
    distributions = space.distributions()
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(distributions, task.grid.sensitivity.tolist(), strict=True)))
    for ranks, score in zip(task.ranks.astype(int).tolist(), task.scores.tolist(), strict=True):
        params = dict(zip(distributions, ranks, strict=True))
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=-score))


def _head(spec: TaskSpec | SmolLM2Spec, task: RecoveryTask | SmolLM2Task) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "spec": settings(spec),
        "space": task.space.to_dict(),
        "dense_loss": task.dense_loss,
        "pruned_loss": task.pruned_loss,
        "seed": SEED,
        "cpu_seconds": 0.0,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{package: version(package) for package in ("torch", "transformers", "numpy")},
        },
        "sensitivity": [float(f"{value:.6g}") for value in task.sensitivity(SEED).values()],
    }


def _text(head: dict[str, Any], space: RankSpace, rows: Sequence[Sequence[float]]) -> str:
    out = io.StringIO()
    out.write(f"# {json.dumps(head)}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*space.distributions(), "loss"])
    writer.writerows([*ranks, f"{loss:.6f}"] for *ranks, loss in rows)
    return out.getvalue()


def _read(file: Path) -> tuple[dict[str, Any], list[list[float]]]:
    with file.open(encoding="utf-8", newline="") as lines:
        head = json.loads(next(lines).removeprefix("#"))
        if head["format"] != _FORMAT:
            raise ValueError(f"{file.name} has format {head['format']}; this version reads {_FORMAT}.")
        _, *rows = csv.reader(lines)
    return head, [[*map(int, ranks), float(loss)] for *ranks, loss in rows]


def main() -> None:
    """Collects, and prints a row per task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="tasks to collect; default: all of small models")
    parser.add_argument("--list", action="store_true", help="only list the tasks")
    parser.add_argument("--studies", type=Path, metavar="FILE", help="only write the collected tasks as studies")
    parser.add_argument("--cache", type=Path, help="folder of the models")
    args = parser.parse_args()
    set_up()
    small = {spec.name: spec for spec in specs()}
    known: dict[str, TaskSpec | SmolLM2Spec] = {**small, SMOLLM2.name: SMOLLM2}
    names = selected(parser, "task", args.names, known) or list(small)
    if args.list:
        print("\n".join(known))
    elif args.studies is not None:
        storage = JournalStorage(JournalFileBackend(str(args.studies)))  # a database takes twenty times as long
        for one in collected():
            add_study(one, storage)
    else:
        rows = []
        for name in names:
            found = read(collect(known[name], cache=args.cache))
            losses = -found.task.scores
            row = {"pruned": found.pruned_loss, "uniform": losses[0], "mean": losses[1:].mean()}
            row |= {"sd": losses[1:].std(ddof=1), "best": losses.min()}
            cells = {key: f"{value:.4f}" for key, value in row.items()}
            rows.append({"task": name, **cells, "CPU s": found.cpu_seconds})
        show(rows)
