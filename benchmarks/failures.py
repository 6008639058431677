"""Trials spent where trials fail, and the best score: this sampler, TPE, GP and random search.

Twelve ranks from 2 to 16. In some cases a total above 100 (the mean of random ranks is 108) has a bad outcome: an
infinite, a huge or a rather high loss, a trial pruned without a report, or an exception; with and without a constraint
that says by how much the total is exceeded. In others a learning rate above 1e-3, half of its range, makes the loss
blow up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import Trial

from benchmarks.report import check, command_parser, set_up, show, write
from rankadaptor_optuna import RankAdaptorSampler, recommend

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "RankAdaptorSampler": lambda seed: RankAdaptorSampler(seed=seed),
    "TPE": lambda seed: TPESampler(seed=seed),
    "GP": lambda seed: GPSampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
_LIMIT = 100  # of the total rank
_CLIFF = 1e-3  # of the learning rate
_BAD = "bad"  # attribute of trials with a bad outcome


def _ranks(trial: Trial) -> list[int]:
    return [trial.suggest_int(f"layer_{i}_rank", 2, 16, step=2) for i in range(12)]


def _loss(ranks: list[int], rate: float | None = None) -> float:
    gain = sum(map(math.log1p, ranks))
    return -gain if rate is None else 3 + 0.1 * abs(math.log10(rate) + 3.5) - 0.01 * gain


def _raise() -> float:
    raise RuntimeError


def _prune() -> float:
    raise optuna.TrialPruned


def total_rank(outcome: Callable[[], float], *, constrained: bool = False) -> Callable[[Trial], float]:
    """Returns an objective that has a bad outcome above a total rank."""

    def objective(trial: Trial) -> float:
        ranks = _ranks(trial)
        if constrained:
            trial.set_constraint("memory", sum(ranks) - _LIMIT)
        if sum(ranks) > _LIMIT:
            trial.set_user_attr(_BAD, True)
            return outcome()
        return _loss(ranks)

    return objective


def learning_rate(outcome: Callable[[float], float]) -> Callable[[Trial], float]:
    """Returns an objective whose loss is a function of the excess (in decades) above a learning rate."""

    def objective(trial: Trial) -> float:
        ranks, rate = _ranks(trial), trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        if rate > _CLIFF:
            trial.set_user_attr(_BAD, True)
            return outcome(math.log10(rate / _CLIFF))
        return _loss(ranks, rate)

    return objective


CASES: dict[str, tuple[int, Callable[[Trial], float]]] = {  # number of trials, objective
    "infinite loss": (40, total_rank(lambda: math.inf)),
    "loss 1e6": (40, total_rank(lambda: 1e6)),
    "loss 100": (40, total_rank(lambda: 100.0)),
    "pruned without a report": (40, total_rank(_prune)),
    "exception": (40, total_rank(_raise)),
    "constraint, infinite loss": (40, total_rank(lambda: math.inf, constrained=True)),
    "constraint, exception": (40, total_rank(_raise, constrained=True)),
    "rate: 50 a decade": (60, learning_rate(lambda excess: 3 + 50 * excess)),
    "rate: 5000 a decade": (60, learning_rate(lambda excess: 3 + 5000 * excess)),
    "rate: infinite": (60, learning_rate(lambda excess: math.inf)),
}


def run(case: str, sampler: BaseSampler) -> tuple[int, float, float, bool]:
    """Returns the number of bad trials, the best loss of the others, and of the recommendation loss and badness."""
    n_trials, objective = CASES[case]
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=n_trials, catch=RuntimeError)
    good = [t.value for t in study.trials if t.value is not None and _BAD not in t.user_attrs]
    params = recommend(study).params
    rate = params.pop("lr", _CLIFF)
    bad = rate > _CLIFF or ("rate" not in case and sum(params.values()) > _LIMIT)
    loss = _loss(list(params.values()), rate if "rate" in case else None)
    return len(study.trials) - len(good), min(good, default=math.inf), loss, bad


def _quiet() -> None:
    set_up()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # exceptions are part of it
    warnings.simplefilter("ignore")


def main() -> None:
    """Runs the command."""
    parser = command_parser(__doc__, "two seeds, without GP")
    parser.add_argument("--seeds", type=int, default=10, help="number of studies of each sampler and case")
    args = parser.parse_args()
    seeds = range(2 if args.quick else args.seeds)
    samplers = [name for name in SAMPLERS if name != "GP" or not args.quick]
    rows: list[dict[str, object]] = []
    checks, n_bad_recommendations = {}, 0
    pool = ProcessPoolExecutor(initializer=_quiet)
    for case, (n_trials, _) in CASES.items():
        started = {name: [pool.submit(run, case, SAMPLERS[name](seed)) for seed in seeds] for name in samplers}
        found = {name: [future.result() for future in futures] for name, futures in started.items()}
        for name, runs in found.items():
            counts, best, recommended, bad = (np.asarray(values) for values in zip(*runs, strict=True))
            row: dict[str, object] = {"case": case, "sampler": name, "trials": n_trials, "bad": f"{counts.mean():.1f}"}
            row |= {"range": f"{counts.min()}-{counts.max()}", "best trial": f"{best.mean():.3f}"}
            row |= {"recommended": f"{recommended.mean():.3f}"}
            rows.append(row | {"bad recommendations": int(bad.sum())})
            n_bad_recommendations += int(bad.sum())
        show(rows[-len(samplers) :])
        ours, tpe = found["RankAdaptorSampler"], found["TPE"]
        excess = (sum(run[0] for run in ours) - sum(run[0] for run in tpe)) / len(ours)
        checks[f"{case}: bad trials more than TPE"] = check(excess, "<= 0")
        excess = (sum(run[2] for run in ours) - sum(run[1] for run in tpe)) / len(ours)
        checks[f"{case}: recommended loss above that of TPE's best trial"] = check(excess, "<= 0")
    checks["bad recommendations"] = check(n_bad_recommendations, "<= 0")
    write("failures", rows, checks, seeds=list(seeds), part=args.quick)


if __name__ == "__main__":
    main()
