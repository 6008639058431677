"""Measure how much compute Optuna's pruners save, and the cost to the result: real recoveries of a small LLaMA.

    python -m benchmarks.pruner_savings [--quick] [--trials 40] [--seeds 10]

The pruned model of a development task is searched by ``RecoveryObjective`` and ``RankAdaptorSampler`` without a prior:
without a pruner, with Optuna's Median and Hyperband pruners on the loss during training, and with its Wilcoxon pruner
on the blocks of the final evaluation. Compute is counted in tokens of a forward and backward pass; a token of an
evaluation or a report, forward alone, counts a third. The recommendation of each study is recovered again with fresh
seeds and scored on text that no search saw. The difference to no pruner is paired by seed, in standard deviations of
random allocations' losses.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState

from benchmarks.report import FRESH, cell, check, command_parser, interval, set_up, show, write
from benchmarks.tasks.models import pruned_model
from benchmarks.tasks.ranks import random_ranks
from benchmarks.tasks.recovery import RecoveryTask, load_task
from benchmarks.tasks.specs import DEVELOPMENT, TINY
from benchmarks.tasks.texts import LENGTH, ByteTokenizer, read_parts
from rankadaptor_optuna import RankAdaptorSampler, RecoveryObjective, create_study, recommend

N_RANDOM = 20
HELD_OUT = 32  # blocks that a trial is scored on
REPORT_EVERY, REPORT_BLOCKS = 3, 8
NONE, HYPERBAND, WILCOXON = "none", "Hyperband", "Wilcoxon"


def pruners(steps: int) -> dict[str, tuple[BasePruner, dict[str, Any]]]:
    """Returns each pruner, with the settings of its reports."""
    during = {"report_every": REPORT_EVERY, "report_blocks": REPORT_BLOCKS}
    return {
        NONE: (NopPruner(), {}),
        "Median": (MedianPruner(), during),
        HYPERBAND: (HyperbandPruner(min_resource=REPORT_EVERY, max_resource=steps), during),
        WILCOXON: (WilcoxonPruner(), {"report_items": True}),
    }


def tokens(trial: FrozenTrial, job: RecoveryObjective, reports: Mapping[str, Any]) -> float:
    """Returns a trial's compute, in tokens of a forward and backward pass."""
    config, n_reports = job.training, len(trial.intermediate_values)
    complete = trial.state is TrialState.COMPLETE
    steps, evaluated = config.steps, len(job.held_out)
    if "report_every" in reports:
        steps = config.steps if complete else trial.last_step or 0
        evaluated = n_reports * REPORT_BLOCKS + (len(job.held_out) if complete else 0)
    elif "report_items" in reports:
        evaluated = n_reports
    return LENGTH * (steps * config.batch_size + evaluated / 3)


def run(task: RecoveryTask, model: Any, who: str, seed: int, n_trials: int) -> dict[str, Any]:  # noqa: ANN401
    """Runs one study; returns its compute, how its trials ended, and the recommended ranks."""
    pruner, reports = pruners(task.spec.recovery.steps)[who]
    parts = read_parts(task.spec.dense.text)
    job = RecoveryObjective(
        model,
        ByteTokenizer(),
        task.space,
        train=parts.recovery,
        validation=parts.validation,
        training=task.spec.recovery,
        block_length=LENGTH,
        validation_blocks=HELD_OUT,
        seed=seed,
        **reports,
    )
    sampler = RankAdaptorSampler(task.space, prior=None, seed=seed)
    study = create_study(study_name=f"{who}-{seed}", sampler=sampler, direction=job.direction, pruner=pruner)
    study.optimize(job, n_trials=n_trials)
    states = [t.state for t in study.trials]
    return {
        "tokens": sum(tokens(t, job, reports) for t in study.trials),
        "pruned": states.count(TrialState.PRUNED),
        "failed": states.count(TrialState.FAIL),
        "ranks": recommend(study, prior=None).ranks,
    }


def main() -> None:
    """Runs all studies and writes results/pruner_savings.json."""
    parser = command_parser(__doc__, "two seeds, 8 trials, a tiny task")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    if args.quick:
        args.trials, args.seeds = 8, 2
    set_up()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    spec = TINY if args.quick else DEVELOPMENT[0]
    start, task, model = time.process_time(), load_task(spec), pruned_model(spec)[0]
    names = list(pruners(spec.recovery.steps))
    studies: dict[str, list[dict[str, Any]]] = {who: [] for who in names}
    for seed in range(args.seeds):
        for who in names:
            studies[who].append(run(task, model, who, seed, args.trials))
            done = studies[who][-1]
            print(f"seed {seed}, {who}: {done['pruned']} pruned, {time.process_time() - start:.0f} s", file=sys.stderr)

    rng = np.random.default_rng(12345)
    random = [random_ranks(task.space, rng) for _ in range(N_RANDOM if not args.quick else 4)]
    asked = [*(study["ranks"] for who in names for study in studies[who]), *random]
    each = task.losses([r for r in asked for _ in FRESH], list(FRESH) * len(asked), report=True)
    losses = np.reshape(each, (-1, len(FRESH))).mean(1)
    spread = float(losses[-len(random) :].std(ddof=1))
    by = dict(zip(names, losses[: -len(random)].reshape(len(names), -1), strict=True))
    rows, worst = [], {}
    for who in names:
        of = studies[who]
        share = [study["tokens"] / plain["tokens"] for study, plain in zip(of, studies[NONE], strict=True)]
        differences = ((by[who] - by[NONE]) / spread).tolist()
        worst[who] = float(np.mean(share)), sum(interval(differences))
        rows.append(
            {
                "pruner": who,
                "pruned": f"{np.mean([study['pruned'] for study in of]):.1f} of {args.trials}",
                "compute / none": cell(share),
                "loss of the result": f"{by[who].mean():.4f}",
                "minus none, in spreads": cell(differences, 2, "+"),
            }
        )
    show(rows)
    bound = "a result not worse than without, upper end of the 95% interval in spreads of random allocations"
    checks = {
        "compute with Hyperband / without": check(worst[HYPERBAND][0], "<= 0.7"),
        "compute with Wilcoxon / without": check(worst[WILCOXON][0], "<= 1"),
        f"Hyperband, {bound}": check(worst[HYPERBAND][1], "<= 0.5"),
        f"Wilcoxon, {bound}": check(worst[WILCOXON][1], "<= 0.5"),
    }
    seeds = {"studies": args.seeds, "fresh": FRESH}
    losses_by = {who: values.tolist() for who, values in by.items()}
    more = {"task": spec.name, "trials": args.trials, "spread": spread, "losses": losses_by}
    write("pruner_savings", rows, checks, seeds=seeds, part=args.quick, **more)
