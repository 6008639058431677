"""How much compute Optuna's pruners save, at which cost to the result: real recoveries of a small LLaMA.

    python -m benchmarks.pruner_savings [--quick] [--trials 40] [--seeds 10]

The pruned model of a development task (benchmarks/recovery_tasks.py) is searched by ``RecoveryObjective`` and
``RankAdaptorSampler`` without a prior: without a pruner, with Optuna's Median and Hyperband pruners on the loss during
training, and with its Wilcoxon pruner on the blocks of the final evaluation. Compute is counted in tokens of a forward
and backward pass; a token of an evaluation or a report, forward alone, counts a third. What ``recommend`` makes of each
study is recovered again with fresh seeds and scored on text that no search saw. The difference to no pruner is paired
by seed, and told as a share of how much random allocations differ (a standard deviation).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import torch
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState

from benchmarks.report import check, interval, show, write
from benchmarks.tasks.recovery import (
    DEVELOPMENT,
    LENGTH,
    RecoveryTask,
    load_pruned_model,
    load_task,
    random_ranks,
    read_parts,
)
from rankadaptor_optuna import RankAdaptorSampler, RecoveryObjective, create_study, recommend

SPEC = DEVELOPMENT[0]
FRESH = (101, 102, 103)
N_RANDOM = 20
HELD_OUT = 32  # blocks that a trial is scored on
REPORT_EVERY, REPORT_BLOCKS = 3, 8
NONE, HYPERBAND, WILCOXON = "none", "Hyperband", "Wilcoxon"


def pruners(steps: int) -> dict[str, tuple[BasePruner, dict[str, Any]]]:
    """Each pruner, with what trials report to it."""
    during = {"report_every": REPORT_EVERY, "report_blocks": REPORT_BLOCKS}
    return {
        NONE: (NopPruner(), {}),
        "Median": (MedianPruner(), during),
        HYPERBAND: (HyperbandPruner(min_resource=REPORT_EVERY, max_resource=steps), during),
        WILCOXON: (WilcoxonPruner(), {"report_items": True}),
    }


def tokens(trial: FrozenTrial, job: RecoveryObjective, reports: Mapping[str, Any]) -> float:
    """What a trial computed, in tokens of a forward and backward pass."""
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
    """One study: its compute, how its trials ended, and the ranks that it recommends."""
    pruner, reports = pruners(task.spec.recovery.steps)[who]
    parts = read_parts(task.spec.dense.text)
    job = RecoveryObjective(
        model,
        _bytes,
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


class _Bytes:
    """The tasks' tokenizer: a token a byte, nothing at the end of a text."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:  # noqa: ANN401
        return {"input_ids": list(text.encode())}


_bytes = _Bytes()


def main() -> None:
    """Runs all studies and writes results/pruner_savings.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two seeds, 8 trials: shows that it runs, no result")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    if args.quick:
        args.trials, args.seeds = 8, 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    torch.set_num_threads(1)  # tensors this small lose more by threads than they gain
    start, task, model = time.process_time(), load_task(SPEC), load_pruned_model(SPEC)
    names = list(pruners(SPEC.recovery.steps))
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
        mean, half = interval(share)
        difference, width = interval(((by[who] - by[NONE]) / spread).tolist())
        worst[who] = mean, difference + width
        rows.append(
            {
                "pruner": who,
                "pruned": f"{np.mean([study['pruned'] for study in of]):.1f} of {args.trials}",
                "compute / none": f"{mean:.3f} ±{half:.3f}",
                "loss of the result": f"{by[who].mean():.4f}",
                "minus none, in spreads": f"{difference:+.2f} ±{width:.2f}",
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
    name = "pruner_savings_part" if args.quick else "pruner_savings"
    found = {"spread": spread, "losses": {who: values.tolist() for who, values in by.items()}, "studies": studies}
    seeds = {"studies": args.seeds, "fresh": FRESH}
    cpu = round(time.process_time() - start)
    write(name, rows, checks, seeds=seeds, task=SPEC.name, trials=args.trials, cpu_seconds_of_this_run=cpu, **found)


if __name__ == "__main__":
    main()
