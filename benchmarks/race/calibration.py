"""Measure whether the performance model's uncertainty is right, and its order; beside the paper's model.

    python -m benchmarks.calibration [--quick] [--seeds 10] [--folder DIR] [TASK ...]

On each of the race's tasks and seeds, both models learn from the first 10 and 25 trials of a RankAdaptor search without
a prior, and predict the losses of 24 random allocations recovered with the same seed: the share of losses inside the
central 50, 80 and 95% intervals, and the rank correlation of predicted and measured losses. The searches are those of
``race.py`` where its folder has them. ``collected`` stands for all collected tasks: there both learn from 10 and 25
recoveries, drawn anew for each seed, and predict the others.

Then the promise of a recommendation: the gain over uniform ranks that ``recommend`` predicts for other seeds and text,
beside the gain that three fresh seeds measure on text that no search saw, in standard deviations of random allocations'
losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from scipy import stats

from benchmarks.race.peers import OURS, ranks_of, samplers
from benchmarks.race.search import Studies, finished, open_folder, recommended, search, sensitivities_of
from benchmarks.report import FRESH, cell, check, command_parser, selected, set_up, show, write
from benchmarks.tasks.collect import Collected, collected
from benchmarks.tasks.losses import Losses
from benchmarks.tasks.recovery import load_task
from benchmarks.tasks.specs import TEST, TINY
from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.surrogate.grid import Array, RankGrid

COLLECTED = "collected"
N_TRIALS = 25
LEARNED_FROM = (10, 25)
LEVELS = (0.5, 0.8, 0.95)
MODES = ("bayesian", "paper")

Judged = dict[tuple[str, int], list[list[float]]]  # ``judged`` of each search, by mode and number of trials


def measured(who: str, study: optuna.Study, space: RankSpace, which: slice) -> tuple[Array, Array]:
    """Returns ranks (n, L) and losses (n,) of some of a search's trials."""
    trials = finished(study)[which]
    ranks = [list(ranks_of(who, space, optuna.trial.FixedTrial(t.params)).values()) for t in trials]
    return np.asarray(ranks, dtype=np.float64), np.asarray([t.values[0] for t in trials])


def judged(mode: str, grid: RankGrid, known: tuple[Array, Array], held_out: tuple[Array, Array]) -> list[float]:
    """Returns the share of held-out losses in each interval, and the rank correlation."""
    model = PerformanceModel(grid, mode=mode, prior=None, direction="minimize")
    model.update(*known)
    mean, std = model.predict(held_out[0])
    if mode == "bayesian":
        std = np.hypot(std, model.noise)  # in paper mode it includes the noise
    off = np.abs(held_out[1] - mean) / std
    covered = [float(np.mean(off <= stats.norm.ppf((1 + level) / 2))) for level in LEVELS]
    return [*covered, float(stats.spearmanr(mean, held_out[1]).statistic)]


def on_collected(tasks: Sequence[Collected], seeds: int) -> Judged:
    """Judges both models on collected tasks."""
    found: Judged = {}
    for task, seed in itertools.product((one.task for one in tasks), range(seeds)):
        order = np.random.default_rng([14, seed]).permutation(len(task.scores))
        for n, mode in itertools.product(LEARNED_FROM, MODES):
            known, held_out = ((task.ranks[rows], -task.scores[rows]) for rows in (order[:n], order[n:]))
            found.setdefault((mode, n), []).append(judged(mode, task.grid, known, held_out))
    return found


def promises(studies: Studies, space: RankSpace, losses: Losses, n: int) -> list[list[float]]:
    """Returns predicted gain, the ends of its interval, and measured gain of each search's recommendation.

    In standard deviations of random allocations' losses; recommendations of uniform ranks promise no gain and are left
    out.
    """
    uniform, found = space.uniform(), []
    for study in (study for (who, _), study in studies.items() if who == OURS):
        made = recommended(OURS, study, space, n)
        if made.ranks != uniform:
            asked = [(ranks, seed) for ranks in (uniform, made.ranks) for seed in FRESH]
            before, after = np.reshape(losses(asked, report=True), (2, -1)).mean(1)
            found.append([made.evidence.gain, *made.evidence.interval, before - after])
    random = [measured(who, study, space, slice(1, N_TRIALS))[1] for (who, _), study in studies.items() if who != OURS]
    return (np.asarray(found) / np.mean([losses.std(ddof=1) for losses in random])).tolist()


def inside(promised: Sequence[Sequence[float]]) -> float:
    """Returns the share of promises whose measured gain is in the interval."""
    _, low, high, gain = np.transpose(promised)
    return float(np.mean((low <= gain) & (gain <= high)))


def promise_row(task: str, n: int, promised: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns the means of promises, and how often the interval held."""
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


def model_rows(task: str, found: Judged) -> list[dict[str, Any]]:
    """Returns means over searches, with the 95% interval of the correlation."""
    rows = []
    for (mode, n), values in found.items():
        *shares, correlations = np.transpose(values)
        covered = {f"in {level:.0%}": f"{np.mean(c):.0%}" for level, c in zip(LEVELS, shares, strict=True)}
        correlation = cell(correlations.tolist(), digits=2)
        rows.append({"task": task, "trials": n, "mode": mode, **covered, "rank correlation": correlation})
    return rows


def checks_of(tasks: str, found: Judged) -> dict[str, Any]:
    """Goals: intervals off by at most 10 points, an order no worse than the paper's model's."""
    checks = {}
    for n in LEARNED_FROM:
        ours, paper = (np.mean(found[mode, n], axis=0) for mode in MODES)
        for level, share in zip(LEVELS, ours, strict=False):
            checks[f"{tasks}: {level:.0%} interval after {n} trials, off by"] = check(abs(share - level), "<= 0.1")
        gain = ours[-1] - paper[-1]
        checks[f"{tasks}: rank correlation after {n} trials, above the paper mode's by"] = check(gain, ">= 0")
    return checks


def main() -> None:
    """Measures, prints a table and writes results/calibration.json."""
    specs = {spec.name: spec for spec in (*TEST, TINY)}
    parser = command_parser(__doc__, "two seeds, a tiny task, two collected tasks")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="tasks of the race, and collected; default: all")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=cache_dir() / "race", help="trials and losses of the race")
    args = parser.parse_args()
    set_up()
    names = selected(parser, "task", args.tasks, [*specs, COLLECTED]) or [*(spec.name for spec in TEST), COLLECTED]
    if args.quick:
        args.seeds, names = 2, args.tasks or [TINY.name, COLLECTED]
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    raced: Judged = {}
    promised: dict[tuple[str, int], list[list[float]]] = {}
    makers = {who: samplers()[who] for who in (OURS, "Random")}
    for name in [n for n in names if n != COLLECTED]:
        task = load_task(specs[name])
        losses, trials = open_folder(args.folder, name, task)
        told = sensitivities_of(args.folder, name, task, args.seeds, [OURS])
        studies = search(task.space, losses, trials, N_TRIALS, args.seeds, makers, sensitivities=told)
        found: Judged = {}
        for n in LEARNED_FROM:
            promised[name, n] = promises(studies, task.space, losses, n)
            promised.setdefault(("all raced", n), []).extend(promised[name, n])
        for n, mode, seed in itertools.product(LEARNED_FROM, MODES, range(args.seeds)):
            known = measured(OURS, studies[OURS, seed], task.space, slice(n))
            # without the first trial, which is uniform in both searches
            held_out = measured("Random", studies["Random", seed], task.space, slice(1, N_TRIALS))
            grid = replace(RankGrid.from_space(task.space), sensitivity=np.asarray([*told[OURS, seed].values()]))
            found.setdefault((mode, n), []).append(judged(mode, grid, known, held_out))
        rows += model_rows(name, found)
        for key, values in found.items():
            raced.setdefault(key, []).extend(values)
    some = collected()[: 2 if args.quick else None] if COLLECTED in names else []
    for tasks, pooled in {"raced": raced, COLLECTED: on_collected(some, args.seeds)}.items():
        if pooled:
            rows += model_rows(f"all {tasks}", pooled)
            checks |= checks_of(tasks, pooled)
    for n in LEARNED_FROM:
        if gains := promised.get(("all raced", n)):
            off = abs(inside(gains) - 0.95)
            checks[f"raced: 95% interval of a promise after {n} trials, on fresh seeds, off by"] = check(off, "<= 0.1")
    show(rows)
    promise_rows = [promise_row(*key, found) for key, found in promised.items() if found]
    show(promise_rows)
    part = args.quick or bool(args.tasks)
    write("calibration", rows, checks, seeds=args.seeds, part=part, promises=promise_rows)
