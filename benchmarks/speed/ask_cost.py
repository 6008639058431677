"""Measure the CPU time of one ask with 30 ranks, after 100, 1,000 and 5,000 finished trials, beside other samplers.

    python -m benchmarks.ask_cost [--quick]

Each ask is that of a study that goes on: a trial is asked for, given its 30 ranks, and told. The first ask in a
process, which reads the whole history, is shown apart. CPU time of one thread, as other load on the machine distorts
wall time. GPSampler and the paper's MLP (trained anew for each ask) are left out where one ask takes seconds.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded

import time
import warnings
from typing import Any

import numpy as np
import optuna

from benchmarks.race.peers import OURS, PAPER, samplers
from benchmarks.report import check, command_parser, set_up, show, write
from benchmarks.tasks.ranks import random_ranks
from rankadaptor_optuna import RankAdaptorSampler, RankSpace

N_LAYERS = 30
SIZES = (100, 1000, 5000)
MOST_FINISHED = {"GP": 100, PAPER: 100}
SEEDS = (0, 1, 2)


def finished_trials(space: RankSpace, n: int, seed: int) -> list[optuna.trial.FrozenTrial]:
    """Returns finished trials with random allocations."""
    rng = np.random.default_rng(seed)
    worth = rng.standard_normal(N_LAYERS)
    trials = []
    for _ in range(n):
        ranks = np.asarray(list(random_ranks(space, rng).values()))
        trials.append(
            optuna.trial.create_trial(
                params={space.name(i): int(r) for i, r in enumerate(ranks)},
                distributions=space.distributions(),
                value=float(np.log(ranks) @ worth + rng.standard_normal()),
            )
        )
    return trials


def ask(study: optuna.Study) -> float:
    """Returns the CPU milliseconds of one ask and its 30 suggestions."""
    start = time.process_time()
    trial = study.ask()
    RankSpace(N_LAYERS).suggest(trial)  # a budget would mark other samplers' proposals as infeasible
    spent = time.process_time() - start
    study.tell(trial, 0.0)  # a score like the others, so that no trial counts as diverged
    return 1000 * spent


def main() -> None:
    """Measures, prints a table and writes results/ask_cost.json."""
    args = command_parser(__doc__, "one seed, 100 and 1,000 trials").parse_args()
    set_up()
    warnings.simplefilter("ignore")
    space = RankSpace(N_LAYERS, budget="uniform:8")
    sizes, seeds = (SIZES[:2], SEEDS[:1]) if args.quick else (SIZES, SEEDS)
    makers: dict[str, Any] = {
        f"{OURS}, shipped prior": lambda space, seed: RankAdaptorSampler(space, seed=seed),
        **samplers(),
    }
    costs: dict[tuple[str, int], list[float]] = {}
    rows = []
    for n in sizes:
        trials = {seed: finished_trials(space, n, seed) for seed in seeds}
        for who, make in makers.items():
            if n > MOST_FINISHED.get(who, n):
                continue
            first, then = [], []
            for seed in seeds:
                study = optuna.create_study(sampler=make(space, seed))
                study.add_trials(trials[seed])
                first.append(ask(study))
                then += [ask(study) for _ in range(5 if who in MOST_FINISHED else 20)]
            costs[who, n] = then
            low, middle, high = np.percentile(then, (25, 50, 75))
            rows.append(
                {
                    "finished trials": n,
                    "sampler": who,
                    "median ms": f"{middle:.1f}",
                    "quartiles": f"{low:.1f} to {high:.1f}",
                    "first ask ms": f"{np.median(first):.0f}",
                }
            )
    show(rows)
    median = {key: float(np.median(values)) for key, values in costs.items()}
    ours = f"{OURS}, shipped prior"
    checks = {
        "CPU ms per ask at 1,000 trials": check(median[ours, 1000], "<= 25"),
        "the same as a multiple of TPE's": check(median[ours, 1000] / median["TPE", 1000], "<= 1"),
    }
    if 5000 in sizes:
        checks["5,000 trials as a multiple of 1,000"] = check(median[ours, 5000] / median[ours, 1000], "<= 2")
    write("ask_cost", rows, checks, seeds=seeds, part=args.quick)
