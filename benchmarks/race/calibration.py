"""Is the performance model as sure as it may be, and does it rank? Its default mode beside the paper's, on recoveries.

    python -m benchmarks.calibration [--quick] [--seeds 10] [--folder DIR] [TASK ...]

On each of the race's tasks and seeds, both modes learn from the first 10 and 25 trials of a RankAdaptor study, without
a prior, and predict the losses of 24 random allocations recovered with the same seed, which they have not seen: how
many lie inside the central 50, 80 and 95% intervals, and how do predicted and measured order agree (Spearman). The
studies are those of ``race.py``; where its folder has them nothing is trained here. ``collected`` stands for all tasks
of ``collect_tasks.py`` so far: there both learn from 10 and 25 of the recoveries, drawn anew for each seed, and predict
the others.

Then what becomes of a recommendation's promise: the gain over uniform that ``recommend`` predicts for other seeds and
other text, and what three fresh seeds measure on text that no search saw, in standard deviations of random allocations'
losses.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy import stats

from benchmarks.race.peers import OURS, ranks_of
from benchmarks.race.race import FRESH, Studies, finished, open_folder, recommended, search, sensitivities_of
from benchmarks.report import FOLDER, check, interval, show, write
from benchmarks.tasks.collect import files, read_task
from benchmarks.tasks.losses import Losses
from benchmarks.tasks.recovery import TEST, load_task
from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.surrogate.grid import Array, RankGrid

COLLECTED = "collected"
N_TRIALS = 25
LEARNED_FROM = (10, 25)
LEVELS = (0.5, 0.8, 0.95)
MODES = ("bayesian", "paper")


def measured(who: str, study: optuna.Study, space: RankSpace, which: slice) -> tuple[Array, Array]:
    """Ranks (n, L) and losses (n,) of some of a study's trials."""
    trials = finished(study)[which]
    ranks = [list(ranks_of(who, space, optuna.trial.FixedTrial(t.params)).values()) for t in trials]
    return np.asarray(ranks, dtype=np.float64), np.asarray([t.values[0] for t in trials])


def judged(mode: str, grid: RankGrid, known: tuple[Array, Array], held_out: tuple[Array, Array]) -> list[float]:
    """Share of held-out losses in each interval, and the rank correlation."""
    model = PerformanceModel(grid, mode=mode, prior=None, direction="minimize")
    model.update(*known)
    mean, std = model.predict(held_out[0])
    if mode == "bayesian":
        std = np.hypot(std, model.noise)  # in paper mode it includes the noise
    off = np.abs(held_out[1] - mean) / std
    covered = [float(np.mean(off <= stats.norm.ppf((1 + level) / 2))) for level in LEVELS]
    return [*covered, float(stats.spearmanr(mean, held_out[1]).statistic)]


def on_collected(seeds: int) -> dict[tuple[str, int], list[list[float]]]:
    """What ``judged`` says by mode and number of trials, for each collected task and seed."""
    found: dict[tuple[str, int], list[list[float]]] = {}
    for file in files():
        task = read_task(file)
        for seed in range(seeds):
            order = np.random.default_rng([14, seed]).permutation(len(task.scores))
            for n, mode in itertools.product(LEARNED_FROM, MODES):
                known, held_out = ((task.ranks[rows], -task.scores[rows]) for rows in (order[:n], order[n:]))
                found.setdefault((mode, n), []).append(judged(mode, task.grid, known, held_out))
    return found


def promises(studies: Studies, space: RankSpace, scores: Losses, n: int) -> list[list[float]]:
    """What ``recommend`` promises after some trials of each search: predicted gain, its interval's ends, measured gain.

    In standard deviations of random allocations; without those that recommend uniform ranks, which promise nothing.
    """
    uniform, found = space.uniform(), []
    for study in (study for (who, _), study in studies.items() if who == OURS):
        made = recommended(OURS, study, space, n)
        if made.ranks != uniform:
            losses = scores([(ranks, seed) for ranks in (uniform, made.ranks) for seed in FRESH], report=True)
            before, after = np.reshape(losses, (2, -1)).mean(1)
            found.append([made.evidence.gain, *made.evidence.interval, before - after])
    random = [measured(who, study, space, slice(1, N_TRIALS))[1] for (who, _), study in studies.items() if who != OURS]
    return (np.asarray(found) / np.mean([losses.std(ddof=1) for losses in random])).tolist()


def inside(promised: Sequence[Sequence[float]]) -> float:
    """The share of promises whose measured gain is in the interval."""
    _, low, high, gain = np.transpose(promised)
    return float(np.mean((low <= gain) & (gain <= high)))


def kept(task: str, n: int, promised: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means of promises, and how often the interval held."""
    predicted, low, _, gain = np.transpose(promised)
    return {
        "task": task,
        "trials": n,
        "recommendations": len(promised),
        "predicted gain": f"{predicted.mean():.2f}",
        "measured gain": f"{gain.mean():.2f}",
        "in the 95% interval": f"{inside(promised):.0%}",
        "below it": f"{np.mean(gain < low):.0%}",
        "interval above 0": int((low > 0).sum()),
    }


def row(task: str, n: int, mode: str, found: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means over seeds, with the 95% interval of the correlation."""
    columns = [list(column) for column in zip(*found, strict=True)]
    covered = {f"in {level:.0%}": f"{np.mean(c):.0%}" for level, c in zip(LEVELS, columns[:-1], strict=True)}
    rho, half = interval(columns[-1])
    return {"task": task, "trials": n, "mode": mode, **covered, "rank correlation": f"{rho:.2f} ±{half:.2f}"}


def main() -> None:
    """Measures, prints a table and writes results/calibration.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    specs = {spec.name: spec for spec in TEST}
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: all of {', '.join([*specs, COLLECTED])}")
    parser.add_argument("--quick", action="store_true", help="two seeds of the first task")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=FOLDER / "race", help="trials and losses of race.py")
    args = parser.parse_args()
    if unknown := set(args.tasks) - {*specs, COLLECTED}:
        parser.error(f"no task named {', '.join(sorted(unknown))}; there are {', '.join([*specs, COLLECTED])}")
    seeds = 2 if args.quick else args.seeds
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    names = args.tasks or ([next(iter(specs))] if args.quick else [*specs, COLLECTED])
    raced: dict[tuple[str, int], list[list[float]]] = {}
    promised: dict[tuple[str, int], list[list[float]]] = {}
    for name in [n for n in names if n != COLLECTED]:
        task = load_task(specs[name], kept=args.folder)
        scores, trials = open_folder(args.folder, name, task)
        told = sensitivities_of(args.folder, name, task, seeds)
        who = [OURS, "Random"]
        studies = search(name, task.space, scores, trials, N_TRIALS, seeds, who, sensitivities=told)
        for n in LEARNED_FROM:
            promised[name, n] = promises(studies, task.space, scores, n)
            promised.setdefault(("all raced", n), []).extend(promised[name, n])
        for n, mode in itertools.product(LEARNED_FROM, MODES):
            found = []
            for seed in range(seeds):
                known = measured(OURS, studies[OURS, seed], task.space, slice(n))
                # without its first trial, which is uniform, as ours is
                held_out = measured("Random", studies["Random", seed], task.space, slice(1, N_TRIALS))
                grid = replace(RankGrid.from_space(task.space), sensitivity=np.asarray([*told[OURS, seed].values()]))
                found.append(judged(mode, grid, known, held_out))
            rows.append(row(name, n, mode, found))
            raced.setdefault((mode, n), []).extend(found)
    pooled = {"raced": raced, COLLECTED: on_collected(seeds) if COLLECTED in names else {}}
    for what, by in pooled.items():
        rows += [row(f"all {what}", n, mode, found) for (mode, n), found in by.items()]
        for n in LEARNED_FROM if by else ():
            ours, paper = (np.mean(by[mode, n], axis=0) for mode in MODES)
            for level, share in zip(LEVELS, ours, strict=False):
                checks[f"{what}: {level:.0%} interval after {n} trials, off by"] = check(abs(share - level), "<= 0.1")
            gain = ours[-1] - paper[-1]
            checks[f"{what}: rank correlation after {n} trials, above the paper mode's by"] = check(gain, ">= 0")
    for n in LEARNED_FROM:
        if gains := promised.get(("all raced", n)):
            off = abs(inside(gains) - 0.95)
            checks[f"raced: 95% interval of a promise after {n} trials, on fresh seeds, off by"] = check(off, "<= 0.1")
    show(rows)
    all_kept = [kept(*key, found) for key, found in promised.items() if found]
    show(all_kept)
    part = args.quick or bool(args.tasks)
    write("calibration_part" if part else "calibration", rows, checks, seeds=seeds, promises=all_kept)


if __name__ == "__main__":
    main()
