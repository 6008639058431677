"""Compare samplers on real recoveries of small LLaMAs: RankAdaptor against Optuna's samplers.

    python -m benchmarks.race [--quick] [--seeds 10] [--trials 50] [--folder DIR] [TASK ...]

Each sampler searches each task with each seed, without a prior, from the uniform configuration and within the same
budget. RankAdaptor is told the layers' sensitivities after the first trial, as ``RecoveryObjective`` tells them (a
forward and a backward pass over the held-out data); once more it searches by the scores alone, as all others do. The
configuration found after 10, 25 and 50 trials (the best trial's, and ``recommend``'s) is recovered again with fresh
seeds and scored on text that no search saw.

Normalised regret, as in HPO-B (Pineda Arango et al., 2021): 0 is the best configuration that any search ended with on
the task, 1 the mean of random allocations that use the budget.

``--folder`` keeps the searches' trials and the losses: a stopped run goes on, and two processes may take different
tasks. A full run takes about 4 CPU hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.race.peers import ALONE, OURS, sampler_of, samplers
from benchmarks.race.regret import Found, discrimination, equivalent_rank, measure, regret
from benchmarks.race.search import best_trial, open_folder, recommended, search, sensitivities_of
from benchmarks.report import FRESH, cell, check, command_parser, selected, set_up, show, write
from benchmarks.tasks.losses import SensitiveTask, Task
from benchmarks.tasks.recovery import load_task
from benchmarks.tasks.specs import DEVELOPMENT, TEST, TINY
from benchmarks.tasks.synthetic import synthetic_tasks
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.embedded import cache_dir

CHECKPOINTS = (10, 25, 50)
RECOMMEND = f"{OURS}, recommend"
MODELLED = (OURS, ALONE, "Random")  # competitors whose trials ``recommend`` is tried on


def race(name: str, task: Task, folder: Path, n_trials: int, seeds: int) -> Found:
    """Runs all samplers on one task; returns the losses on fresh seeds, see ``measure``."""
    space = task.space
    losses, known = open_folder(folder, name, task)
    makers, told = samplers(), {}
    if isinstance(task, SensitiveTask):
        told = sensitivities_of(folder, name, task, seeds, [OURS])
        makers = {**makers, ALONE: makers[OURS]}
    studies = search(space, losses, known, n_trials, seeds, makers, sensitivities=told)
    chosen: dict[tuple[str, int, int], Ranks] = {}
    for (who, seed), study in studies.items():
        for n in [n for n in CHECKPOINTS if n <= n_trials]:
            chosen[who, n, seed] = best_trial(who, study, space, n)
            if who in MODELLED:
                chosen[f"{who}, recommend", n, seed] = recommended(who, study, space, n).ranks
    return measure(name, task, losses, chosen)


def summarise(all_found: Sequence[Found], checkpoints: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    """Returns the table's rows and the checks."""
    final = 25 if 25 in checkpoints else checkpoints[-1]
    rows: list[dict[str, Any]] = []
    better: list[str] = []
    means: dict[str, list[float]] = {}
    for found in all_found:
        by = {who: {n: regret(found, losses[n]) for n in checkpoints} for who, losses in found["losses"].items()}
        # one entry a sampler: RankAdaptor's recommendation, the best trial of the others
        raced = [RECOMMEND, *(who for who in by if sampler_of(who) != OURS and "recommend" not in who)]
        places = {n: stats.rankdata([by[who][n] for who in raced], axis=0).mean(1) for n in checkpoints}
        for who in by:
            row: dict[str, Any] = {"task": found["task"], "who": who}
            for n in checkpoints:
                row[f"regret@{n}"] = cell(by[who][n].tolist())
                row[f"place@{n}"] = f"{places[n][raced.index(who)]:.1f}" if who in raced else ""
            difference = by[RECOMMEND][final] - by[who][final]
            if who != RECOMMEND and difference.any():
                p = float(stats.wilcoxon(difference).pvalue)
                row[f"p@{final}"] = f"{p:.3f}"
                if p < 0.05 and difference.mean() > 0 and who in raced:
                    better.append(f"{who} on {found['task']}")
            loss = float(np.mean(found["losses"][who][final]))
            row["gain on uniform"] = f"{found['uniform'] - loss:+.4f}"
            row["as rank"] = f"{equivalent_rank(found, loss):.1f}"
            rows.append(row)
            means.setdefault(who, []).append(float(by[who][final].mean()))
        means.setdefault("uniform", []).append(float(regret(found, found["uniform"])))
        rows.append({"task": found["task"], "who": "uniform", f"regret@{final}": f"{means['uniform'][-1]:.3f}"})
    rows += [
        {"task": "all", "who": who, f"regret@{final}": f"{np.mean(m):.3f}", "tasks": len(m)} for who, m in means.items()
    ]
    peers = {who: float(np.mean(m)) for who, m in means.items() if not who.startswith(OURS) and "recommend" not in who}
    best = min((peer for peer in peers if peer != "uniform"), key=lambda peer: peers[peer])
    ratio = float(np.mean(means[RECOMMEND])) / peers[best]
    checks = {
        f"mean regret at {final} trials / that of the best peer ({best})": check(ratio, "<= 0.6"),
        f"peers significantly better at {final} trials: {', '.join(better) or 'none'}": check(len(better), "<= 0"),
    }
    return rows, checks


def main() -> None:
    """Runs the race and writes results/race.json, and results/race_synthetic.json for the synthetic tasks."""
    parser = command_parser(__doc__, "two seeds, 10 trials, a tiny task and a synthetic one")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all test tasks and synthetic tasks")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=CHECKPOINTS[-1])
    parser.add_argument("--folder", type=Path, default=cache_dir() / "race", help="trials and losses")
    args = parser.parse_args()
    set_up()
    specs = {spec.name: spec for spec in (*TEST, *DEVELOPMENT, TINY)}
    synthetic = {task.name: task for task in synthetic_tasks()}
    names = selected(parser, "task", args.tasks, [*specs, *synthetic])
    names = names or [*(spec.name for spec in TEST), *synthetic]
    if args.quick:
        args.seeds, args.trials, names = 2, 10, args.tasks or [TINY.name, next(iter(synthetic))]
    for output, chosen in (("race", specs), ("race_synthetic", synthetic)):
        found = []
        for name in [n for n in names if n in chosen]:
            task: Task = synthetic.get(name) or load_task(specs[name])
            found.append(race(name, task, args.folder, args.trials, args.seeds))
        if found:
            show([discrimination(one) for one in found])
            rows, checks = summarise(found, [n for n in CHECKPOINTS if n <= args.trials])
            show(rows)
            seeds = {"searches": args.seeds, "fresh": FRESH}
            write(output, rows, checks, seeds=seeds, part=args.quick or bool(args.tasks))
