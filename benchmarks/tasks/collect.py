"""Collect real recoveries of many small models as tasks for the prior to be meta-learned from.

Each task is a byte-level LLaMA (as in benchmarks/recovery_tasks.py, but of other families than the race is run on),
pruned, and recovered a hundred times: with uniform ranks, with random ones, and with ranks that vary smoothly along the
depth. It is written as results/tasks/NAME.csv: a line of JSON that says all about it, with the layers' sensitivity that
its uniform ranks show, then ranks and loss. Run it again
and it goes on where it stopped; several may collect different tasks at the same time.

    python -m benchmarks.collect_tasks [NAME ...]        # all tasks of small models by default; --list tells them
    python -m benchmarks.collect_tasks --studies FILE    # the tasks so far as studies in an Optuna journal, to browse

``results/tasks.journal.gz`` is such a journal: ``gunzip`` it, and ``optuna-dashboard FILE`` shows it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import FOLDER, show
from benchmarks.tasks.recovery import (
    TOGETHER,
    Damage,
    Dense,
    RecoveryTask,
    TaskSpec,
    load_task,
    random_ranks,
    settings,
    weighted_ranks,
)
from benchmarks.tasks.simulated import smooth
from benchmarks.tasks.smollm2 import SMOLLM2, SmolLM2Spec, SmolLM2Task, load_smollm2
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.surrogate.grid import RankGrid

TASKS = FOLDER / "tasks"
N_RECOVERIES = 100
_FORMAT = 1
_LOSS = "loss"
_SHAPES = (  # text, layers, hidden size
    *(("wikitext2", *shape) for shape in ((6, 64), (9, 80), (14, 48), (20, 48))),
    *(("alpaca", *shape) for shape in ((7, 64), (12, 48), (16, 64), (24, 32))),
    *(("docs", *shape) for shape in ((6, 80), (10, 64), (13, 48), (18, 48))),
    *(("questions", *shape) for shape in ((8, 48), (11, 64), (15, 64), (22, 48))),
)
_CANDIDATES = ((2, 4, 6, 8, 10, 12), (0, 4, 8, 16, 32), (2, 4, 8, 16), (1, 2, 4, 8))


def specs() -> list[TaskSpec]:
    """The tasks: each model pruned in three ways, everything else drawn from what a user may choose."""
    found = []
    for i, (text, n_layers, hidden) in enumerate(_SHAPES):
        heads = hidden // 16
        kv_heads = 1 if i % 2 else heads
        training = TrainingConfig(steps=1000, batch_size=32, learning_rate=3e-3)
        dense = Dense(text, n_layers, hidden, heads, kv_heads, hidden * 5 // 2 // 16 * 16, training, seed=100 + i)
        rng = np.random.default_rng([11, i])
        for kind, ratios in (("taylor", (0.5, 0.6, 0.7)), ("rough", (0.7, 0.8, 0.9)), ("even", (0.4, 0.5, 0.6))):
            candidates = _CANDIDATES[rng.integers(len(_CANDIDATES))]
            recovery = TrainingConfig(int(rng.choice([16, 24, 40])), 8, float(rng.choice([1e-3, 1.5e-3, 2e-3])))
            ratio = float(rng.choice(ratios))
            if kind == "taylor" and kv_heads == 1 and hidden < 64:
                ratio = min(ratio, 0.6)  # the only key-value head stays, so 0.7 cannot be reached
            damage = Damage(kind, ratio, seed=100 + i)
            budget = f"uniform:{8 if 8 in candidates[:-1] else 4}"
            found.append(TaskSpec(f"{text}-{n_layers}x{hidden}-{kind}", dense, damage, recovery, candidates, budget))
    return found


def configurations(space: RankSpace, n: int = N_RECOVERIES, seed: int = 0) -> list[dict[int, int]]:
    """Uniform ranks first, then random and smooth ones in turn, none twice (where there are so many)."""
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
    """Recovers what is missing of a task; until all is done, what is so far is in NAME.csv.part."""
    file, part = folder / f"{spec.name}.csv", folder / f"{spec.name}.csv.part"
    head, rows = next((_read(one) for one in (part, file) if one.exists()), ({}, []))
    if len(rows) >= n and "sensitivity" in head:
        return file
    start = time.process_time()
    task = open_task(spec, cache)
    wanted = configurations(task.space, n)
    head = head or _head(spec, task)
    _check(head, spec, file)
    folder.mkdir(parents=True, exist_ok=True)
    if "sensitivity" not in head:
        head["sensitivity"] = [float(f"{value:.6g}") for value in task.sensitivity(head["seed"]).values()]
        write_text(part, _text(head, task.space, rows))
    with tqdm(total=len(wanted), initial=len(rows), desc=spec.name, leave=False, dynamic_ncols=True) as bar:
        while len(rows) < len(wanted):
            chunk = wanted[len(rows) : len(rows) + TOGETHER]
            losses = task.losses(chunk, seed=head["seed"])
            rows += [[*ranks.values(), loss] for ranks, loss in zip(chunk, losses, strict=True)]
            now = time.process_time()
            head["cpu_seconds"], start = round(head["cpu_seconds"] + now - start, 1), now
            write_text(part, _text(head, task.space, rows))
            bar.update(len(chunk))
    if part.exists():
        part.replace(file)
    return file


def _head(spec: TaskSpec | SmolLM2Spec, task: RecoveryTask | SmolLM2Task) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "spec": settings(spec),
        "space": task.space.to_dict(),
        "dense_loss": task.dense_loss,
        "pruned_loss": task.pruned_loss,
        "seed": 0,
        "cpu_seconds": 0.0,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{package: version(package) for package in ("torch", "transformers", "numpy")},
        },
    }


def _check(head: dict[str, Any], spec: TaskSpec | SmolLM2Spec, file: Path) -> None:
    if head["spec"] != settings(spec):
        raise ValueError(f"{file.name} is of other settings; move it away to collect the task anew.")


def _text(head: dict[str, Any], space: RankSpace, rows: Sequence[Sequence[float]]) -> str:
    out = io.StringIO()
    out.write(f"# {json.dumps(head)}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*space.distributions(), _LOSS])
    writer.writerows([*ranks, f"{loss:.6f}"] for *ranks, loss in rows)
    return out.getvalue()


def _read(file: Path) -> tuple[dict[str, Any], list[list[float]]]:
    with file.open(encoding="utf-8", newline="") as lines:
        head = json.loads(next(lines).removeprefix("#"))
        if head["format"] != _FORMAT:
            raise ValueError(f"{file.name} has format {head['format']}; this version reads {_FORMAT}.")
        _, *rows = csv.reader(lines)
    return head, [[*map(int, ranks), float(loss)] for *ranks, loss in rows]


def files(folder: Path = TASKS) -> Iterator[Path]:
    """What has been collected in full, by name."""
    return iter(sorted(folder.glob("*.csv")))


def read_task(file: Path) -> MetaTask:
    """A collected task, to meta-learn from; tasks of one dense model are a family."""
    head, rows = _read(file)
    table, space = np.asarray(rows, dtype=np.float64), RankSpace.from_dict(head["space"])
    return MetaTask(
        grid=replace(RankGrid.from_space(space), sensitivity=np.asarray(head["sensitivity"])),
        ranks=table[:, :-1],
        scores=-table[:, -1],
        name=head["spec"]["name"],
        family=_family(head),
    )


def read_pruned_loss(file: Path) -> float:
    """The loss that a collected task has without recovery."""
    return float(_read(file)[0]["pruned_loss"])


def read_space(file: Path) -> RankSpace:
    """The rank space of a collected task."""
    return RankSpace.from_dict(_read(file)[0]["space"])


def read_cost(file: Path) -> float:
    """CPU seconds that a collected task took."""
    return float(_read(file)[0]["cpu_seconds"])


def _family(head: dict[str, Any]) -> str:
    if "family" in head["spec"]:
        return str(head["spec"]["family"])
    dense = head["spec"]["dense"]
    return f"{dense['text']}-{dense['n_layers']}x{dense['hidden']}"


def add_study(file: Path, storage: Any) -> None:  # noqa: ANN401
    """A collected task as an ordinary Optuna study, where there is none of its name yet."""
    import optuna

    from rankadaptor_optuna.attributes import RECIPE_ATTR, SENSITIVITY_ATTR, SPACE_ATTR

    head, rows = _read(file)
    if head["spec"]["name"] in optuna.get_all_study_names(storage):
        return
    study = optuna.create_study(storage=storage, study_name=head["spec"]["name"], direction="minimize")
    study.set_user_attr(SPACE_ATTR, head["space"])
    study.set_user_attr(RECIPE_ATTR, {"model": _family(head), **head["spec"]})
    distributions = RankSpace.from_dict(head["space"]).distributions()
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(distributions, head["sensitivity"], strict=True)))
    for *ranks, loss in rows:
        params = {name: int(rank) for name, rank in zip(distributions, ranks, strict=True)}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=loss))


def main() -> None:
    """Collects, and prints a row per task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help="tasks to collect; default: all of small models")
    parser.add_argument("--list", action="store_true", help="only tell which tasks there are")
    parser.add_argument("--studies", type=Path, metavar="FILE", help="only write the tasks so far as studies")
    parser.add_argument("--cache", type=Path, help="folder of the models")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small lose more by threads than they gain
    small = {spec.name: spec for spec in specs()}
    known: dict[str, TaskSpec | SmolLM2Spec] = {**small, SMOLLM2.name: SMOLLM2}
    if unknown := set(args.names) - set(known):
        parser.error(f"no task named {', '.join(sorted(unknown))}; --list tells which there are")
    if args.list:
        print("\n".join(known))
    elif args.studies is not None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = JournalStorage(JournalFileBackend(str(args.studies)))  # a database takes twenty times as long
        for file in files():
            add_study(file, storage)
    else:
        rows = []
        for name in args.names or small:
            head, found = _read(collect(known[name], cache=args.cache))
            losses = np.asarray(found)[:, -1]
            row = {"task": name, "dense": head["dense_loss"], "pruned": head["pruned_loss"], "uniform": losses[0]}
            row |= {"mean": losses[1:].mean(), "sd": losses[1:].std(ddof=1), "best": losses.min()}
            rows.append(
                {key: value if isinstance(value, str) else f"{value:.4f}" for key, value in row.items()}
                | {"CPU s": head["cpu_seconds"]}
            )
        show(rows)


if __name__ == "__main__":
    main()
