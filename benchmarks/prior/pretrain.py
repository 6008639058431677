"""Learn the shipped prior from the collected tasks, and measure whether it helps on families that it has not seen.

    python -m benchmarks.pretrain_prior [--quick] [--write]

One family of models (an architecture and a text) at a time is held out, and a prior is learned from the tasks of all
others. On the tasks held out, the performance model learns from a few of the recoveries (the uniform one first, the
rest drawn anew for each seed) and predicts the recoveries that it has not seen, with that prior and without: the rank
correlation of predicted and measured losses. Once the model knows the layers' sensitivities, as ``RecoveryObjective``
tells them, once it does not. No recovery is run; ``transfer.py`` measures the gain in a search. ``--write`` learns
from all tasks and replaces the prior that the package ships.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.report import cell, check, command_parser, show, write
from benchmarks.tasks.collect import collected
from rankadaptor_optuna.priors.meta import MetaTask, meta_train
from rankadaptor_optuna.surrogate.prior import PRETRAINED, Prior
from rankadaptor_optuna.surrogate.statistics import rank_correlation

LEARNED_FROM = (2, 5, 10, 25)
KNOWN, UNKNOWN = SENSITIVITIES = ("known", "unknown")

Agreements = Mapping[str, Sequence[tuple[list[float], list[float]]]]  # by ``SENSITIVITIES``, of each task


def agreement(task: MetaTask, prior: Prior | None, seeds: int) -> list[float]:
    """Returns the rank correlation by number of recoveries learned from, mean over seeds."""
    found = []
    for seed in range(seeds):
        order = np.random.default_rng([15, seed]).permutation(np.arange(1, len(task.scores)))
        order = np.concatenate([[0], order])
        unseen = order[LEARNED_FROM[-1] :]
        model, by_number = task.model(prior), []
        for start, end in zip((0, *LEARNED_FROM), LEARNED_FROM, strict=False):
            model.update(task.ranks[order[start:end]], task.scores[order[start:end]])
            by_number.append(rank_correlation(model.predict(task.ranks[unseen])[0], task.scores[unseen]))
        found.append(by_number)
    means: list[float] = np.mean(found, axis=0).tolist()
    return means


def held_out(tasks: Sequence[MetaTask], seeds: int) -> dict[str, Agreements]:
    """Returns ``agreement`` with a prior that has not seen the family and without one, for each family's tasks."""
    found: dict[str, Agreements] = {}
    for family in sorted({task.family for task in tasks}):
        prior = meta_train([task for task in tasks if task.family != family])
        own = [task for task in tasks if task.family == family]
        found[family] = {
            sensitivities: [(agreement(task, prior, seeds), agreement(task, None, seeds)) for task in some]
            for sensitivities, some in ((KNOWN, own), (UNKNOWN, [task.without_sensitivity() for task in own]))
        }
        print(f"{family}: done", file=sys.stderr)
    return found


def summarise(by_family: Mapping[str, Agreements]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the table's rows and the checks."""
    rows: list[dict[str, Any]] = []
    checks = {}
    for sensitivities in SENSITIVITIES:
        # (families, with or without, numbers)
        means = np.asarray([np.mean(own[sensitivities], axis=0) for own in by_family.values()])
        for i, n in enumerate(LEARNED_FROM):
            gains = means[:, 0, i] - means[:, 1, i]
            columns = {"with the prior": means[:, 0, i], "without": means[:, 1, i], "gain": gains}
            rows.append(
                {
                    "sensitivities": sensitivities,
                    "learned from": n,
                    **{name: cell(values.tolist()) for name, values in columns.items()},
                    "p": f"{stats.ttest_1samp(gains, 0).pvalue:.4f}",
                    "families helped": int((gains > 0).sum()),
                    "not helped": ", ".join(np.asarray(list(by_family))[gains <= 0]),
                }
            )
            name = f"gain in rank correlation on families held out, sensitivities {sensitivities}, {n} recoveries"
            checks[name] = check(float(gains.mean()), ">= 0")
    return rows, checks


def main() -> None:
    """Measures, prints, and with --write replaces the shipped prior."""
    parser = command_parser(__doc__, "one seed, three families")
    parser.add_argument("--write", action="store_true", help="replace the shipped prior")
    args = parser.parse_args()
    sources = collected()
    tasks, seeds = [source.task for source in sources], 5
    if args.quick:
        some, seeds = sorted({task.family for task in tasks})[:3], 1
        tasks = [task for task in tasks if task.family in some]
    by_family = held_out(tasks, seeds)
    rows, checks = summarise(by_family)
    print(f"{len(tasks)} tasks of {len(by_family)} families, each held out once")
    show(rows)
    write("pretrain_prior", rows, checks, seeds=seeds, part=args.quick, tasks=[task.name for task in tasks])
    if args.write:
        prior = meta_train(tasks)
        card = {
            **prior.card,
            "families_held_out": [{key: str(value) for key, value in row.items()} for row in rows],
            "cpu_hours": round(sum(source.cpu_seconds for source in sources) / 3600, 1),
            "made_by": "python -m benchmarks.pretrain_prior --write",
        }
        replace(prior, card=card).save(PRETRAINED)
        print(f"wrote {PRETRAINED.name}: {PRETRAINED.stat().st_size:,} bytes")
