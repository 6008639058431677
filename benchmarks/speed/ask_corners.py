"""Measure the CPU time of one ask beside TPE's in slow corners: many ranks, many pruned trials, a learning rate.

Trials have random ranks from 2 to 16; pruned ones reported at each step up to a random one of 300. Each ask is that of
a study that goes on, in one thread, after a first ask that reads the history.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded

import time
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks.report import check, command_parser, set_up, show, write
from rankadaptor_optuna import RankAdaptorSampler

_STEPS = 300
_RATE = "lr"


class Corner(NamedTuple):
    """Size of a study: ranks, trials, shares of pruned and of infinite scores, whether a learning rate is searched."""

    ranks: int
    trials: int
    pruned: float = 0.0
    rate: bool = False
    failed: float = 0.0


CORNERS = {
    "50 trials": Corner(12, 50),
    "2,000 trials, half pruned": Corner(12, 2000, 0.5),
    "30 ranks and a rate, 1,000 trials, half pruned": Corner(30, 1000, 0.5, rate=True),
    "50 trials, a tenth failed": Corner(12, 50, failed=0.1),
    "2,000 trials, a tenth failed": Corner(12, 2000, failed=0.1),
    "224 ranks": Corner(224, 50),
    "560 ranks": Corner(560, 50),
}


def search_space(corner: Corner) -> dict[str, BaseDistribution]:
    """Returns the parameters of a corner's trials."""
    space: dict[str, BaseDistribution] = {
        f"layer_{i:03}_rank": IntDistribution(2, 16, step=2) for i in range(corner.ranks)
    }
    return space | ({_RATE: FloatDistribution(1e-5, 1e-1, log=True)} if corner.rate else {})


def _loss(params: Mapping[str, float]) -> float:
    return -float(np.log1p([rank for name, rank in params.items() if name != _RATE]).sum())


def finished_trials(corner: Corner) -> list[FrozenTrial]:
    """Returns the trials of a corner."""
    rng, space, trials = np.random.default_rng(0), search_space(corner), []
    for _ in range(corner.trials):
        params = {name: int(rng.choice(np.arange(2, 17, 2))) for name in space if name != _RATE}
        value = _loss(params) + 0.3 * float(rng.standard_normal())
        rate = {_RATE: float(10 ** rng.uniform(-5, -1))} if corner.rate else {}
        is_pruned = bool(rng.random() < corner.pruned)
        last = int(rng.integers(1, _STEPS + 1)) if is_pruned else _STEPS if corner.pruned else 0
        trials.append(
            create_trial(
                state=TrialState.PRUNED if is_pruned else TrialState.COMPLETE,
                params={**params, **rate},
                distributions=space,
                value=None if is_pruned else float("inf") if rng.random() < corner.failed else value,
                intermediate_values={step: value + 3 * float(np.exp(-step / 50)) for step in range(1, last + 1)},
            )
        )
    return trials


def cost_of_ask(corner: Corner, sampler: BaseSampler, n_asks: int) -> float:
    """Returns the median of the CPU milliseconds of asks."""
    study, space = optuna.create_study(sampler=sampler), search_space(corner)
    study.add_trials(finished_trials(corner))
    study.ask(space)
    spent = []
    for _ in range(n_asks):
        start = time.process_time()
        trial = study.ask(space)
        spent.append(1000 * (time.process_time() - start))
        study.tell(trial, _loss(trial.params))
    return float(np.median(spent))


def main() -> None:
    """Measures, prints a table and writes results/ask_corners.json."""
    args = command_parser(__doc__, "the first corner").parse_args()
    set_up()
    warnings.simplefilter("ignore")
    rows, checks = [], {}
    for name, corner in list(CORNERS.items())[: 1 if args.quick else None]:
        ours, tpe = (cost_of_ask(corner, make(seed=0), 10) for make in (RankAdaptorSampler, TPESampler))
        rows.append({"corner": name, "RankAdaptor ms": f"{ours:.0f}", "TPE ms": f"{tpe:.0f}"})
        checks[f"{name}: multiple of TPE's"] = check(ours / tpe, "<= 2")
    show(rows)
    write("ask_corners", rows, checks, seeds=[0], part=args.quick)
