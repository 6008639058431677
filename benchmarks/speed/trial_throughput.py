"""Measure the cost of a trial beyond its training on SmolLM2-135M, beside a bare PyTorch and PEFT loop and lm-eval.

    python -m benchmarks.trial_throughput [--quick] [--trials 100]

Trials of a study recover the model pruned by 25%. All times are CPU seconds of one thread, and the two sides of a
comparison take turns at going first, so that other load on the machine affects both: training tokens per second of a
trial beside the plainest loop with the same adapters, batches and optimiser; requests per second of an evaluation
beside ``lm_eval.simple_evaluate`` on the same items. Then a trial's time without its training (suggestion, adapter on
and off, one held-out block, storage), also without that block, whose forward pass is the evaluation; and the memory of
the process over many short trials.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import optuna
import psutil
import torch
from peft import get_peft_model

from benchmarks.report import check, command_parser, set_up, show, write
from benchmarks.tasks.texts import lm_eval_tasks
from rankadaptor_optuna import RankAdaptorSampler, RankSpace, RecoveryObjective
from rankadaptor_optuna.llm.texts import load_texts
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.lora import lora_config
from rankadaptor_optuna.recovery.models import load_model, quiet
from rankadaptor_optuna.recovery.tasks import TaskSuite
from rankadaptor_optuna.recovery.train import TrainingConfig, batches

TASKS = ("local_arc_easy", "local_piqa")


def spread(values: list[float]) -> str:
    """Formats median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


@contextmanager
def clocked(*names: str) -> Iterator[dict[str, list[float]]]:
    """Records the CPU seconds of each call that trials make of these functions."""
    spent: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            start = time.process_time()
            found = function(*args, **kwargs)
            spent[name].append(time.process_time() - start)
            return found

        return call

    module = sys.modules[RecoveryObjective.__module__]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(module, name, timed(name, getattr(module, name))))
        yield spent


def in_turns(rounds: int, *runs: Callable[[], None]) -> None:
    """Runs all in each round, in the other order every other time."""
    for i in range(rounds):
        for run in runs[:: 1 if i % 2 else -1]:
            run()


def bare(job: RecoveryObjective, ranks: Ranks) -> float:
    """Returns tokens per second of the plainest loop that trains the same adapters on the same batches."""
    config = job.training
    model = get_peft_model(job.model, lora_config(ranks, job.lora))
    try:
        start, tokens = time.process_time(), 0
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
        blocks = torch.tensor([list(ids) for ids in job.train.ids])
        model.train()
        for rows in batches(len(blocks), config, 0):
            ids = blocks[rows]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            tokens += ids.numel()
        return tokens / (time.process_time() - start)
    finally:
        model.unload()


def training(job: RecoveryObjective, rounds: int) -> tuple[dict[str, Any], float]:
    """Measures tokens per second of a trial beside the bare loop, round by round."""
    ranks = job.space.with_fixed(job.space.uniform())
    study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, seed=0))
    plain: list[float] = []
    with clocked("train") as spent:
        in_turns(rounds + 1, lambda: plain.append(bare(job, ranks)), lambda: study.optimize(job, n_trials=1))
    tokens = job.training.steps * job.training.batch_size * len(job.train.ids[0])
    ours, plain = [tokens / seconds for seconds in spent["train"]][1:], plain[1:]  # the first round warms up
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    row = {
        "quantity": "training, tokens per CPU s",
        "ours": spread(ours),
        "peer": spread(plain),
        "ratio": spread(ratios),
    }
    return row, float(np.median(ratios))


def overhead(model: Any, tokenizer: Any, space: RankSpace, texts: Any, rounds: int) -> tuple[list[Any], float]:  # noqa: ANN401
    """Measures CPU seconds of a trial, from the end of the one before, without its training, its block, or both."""
    job = objective(model, tokenizer, space, texts, TrainingConfig(steps=1, batch_size=1), blocks=1)
    study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(space, seed=0))
    ends: list[float] = []
    with clocked("train", "block_losses") as spent:
        study.optimize(job, n_trials=rounds + 2, callbacks=[lambda study, trial: ends.append(time.process_time())])
    trained, blocks = (np.asarray(spent[name])[2:] for name in ("train", "block_losses"))
    untrained = np.diff(ends)[1:] - trained
    rows = [
        {"quantity": "a trial without its training, CPU s", "ours": spread(untrained.tolist())},
        {"quantity": "its block of 256 held-out tokens, CPU s", "ours": spread(blocks.tolist())},
        {"quantity": "a trial without either, CPU s", "ours": spread((untrained - blocks).tolist())},
    ]
    return rows, float(np.median(untrained - blocks))


def evaluation(model: Any, tokenizer: Any, limit: int, rounds: int) -> tuple[dict[str, Any], float, bool]:  # noqa: ANN401
    """Measures requests per second beside lm-eval's, and whether the accuracies agree."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with lm_eval_tasks() as folder:
        suite = TaskSuite(tokenizer, TASKS, limit=limit, include_path=folder)
        manager = TaskManager(include_defaults=False, include_path=folder)
        n_requests = len(suite._requests("loglikelihood"))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
        ours: list[float] = []
        theirs: list[float] = []
        found: dict[str, Any] = {}

        def evaluate() -> None:
            start = time.process_time()
            found["ours"] = suite.evaluate(model)
            ours.append(n_requests / (time.process_time() - start))

        def lm_eval() -> None:
            start = time.process_time()
            found["theirs"] = simple_evaluate(
                lm, tasks=list(TASKS), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False, **seeds
            )
            theirs.append(n_requests / (time.process_time() - start))

        in_turns(rounds, evaluate, lm_eval)
    results = found["theirs"]["results"]
    same = all(
        abs(results[s.task].get("acc_norm,none", results[s.task]["acc,none"]) - s.accuracy) < 1e-9
        for s in found["ours"]
    )
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    row = {
        "quantity": "evaluation, requests per CPU s",
        "ours": spread(ours),
        "peer": spread(theirs),
        "ratio": spread(ratios),
    }
    return row, float(np.median(ratios)), same


def memory(model: Any, tokenizer: Any, space: RankSpace, texts: Any, trials: int) -> tuple[dict[str, Any], float]:  # noqa: ANN401
    """Measures resident memory in MiB over many trials of one step: after a tenth of them, and at the end."""
    job = objective(model, tokenizer, space, texts, TrainingConfig(steps=1, batch_size=1), blocks=1, length=64)
    study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(space, seed=0))
    resident: list[float] = []
    process = psutil.Process()
    study.optimize(
        job, n_trials=trials, callbacks=[lambda study, trial: resident.append(process.memory_info().rss / 2**20)]
    )
    first, last = resident[max(0, trials // 10 - 1)], resident[-1]
    row = {
        "quantity": f"resident MiB after {max(1, trials // 10)} and {trials} trials",
        "ours": f"{first:.0f}, {last:.0f}",
    }
    return row, last / first


def objective(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    space: RankSpace,
    texts: Any,  # noqa: ANN401
    config: TrainingConfig,
    *,
    blocks: int,
    length: int = 256,
) -> RecoveryObjective:
    """Returns the objective of trials on the embedded text."""
    return RecoveryObjective(
        model,
        tokenizer,
        space,
        train=texts.train,
        validation=texts.validation,
        training=config,
        block_length=length,
        validation_blocks=blocks,
    )


def main() -> None:
    """Measures, prints a table and writes results/trial_throughput.json."""
    parser = command_parser(__doc__, "few rounds and trials")
    parser.add_argument("--trials", type=int, default=100, help="number of trials of the memory measurement")
    args = parser.parse_args()
    rounds, limit, trials = (2, 8, 10) if args.quick else (5, 16, args.trials)
    quiet()
    set_up()
    start = time.perf_counter()
    dense, tokenizer = load_model(dtype=torch.float32)
    loading = time.perf_counter() - start
    texts = load_texts()
    model = prune(dense, tokenizer, ratio=0.25, calibration=texts.train).model
    space = RankSpace.from_model(model, candidates=(2, 4, 6, 8, 10, 12), budget="uniform:8")
    job = objective(model, tokenizer, space, texts, TrainingConfig(steps=2, batch_size=2), blocks=1)
    rows: list[dict[str, Any]] = [{"quantity": "loading the model, once, s", "ours": f"{loading:.2g}"}]
    trained, ratio = training(job, rounds)
    left, seconds = overhead(model, tokenizer, space, texts, rounds)
    evaluated, of_requests, same = evaluation(model, tokenizer, limit, rounds)
    kept, growth = memory(model, tokenizer, space, texts, trials)
    rows += [trained, *left, evaluated, kept]
    show(rows)
    checks = {
        "training tokens per CPU second of a trial / those of a bare loop": check(ratio, ">= 0.95"),
        "CPU seconds of a trial beyond its training and its held-out block": check(seconds, "<= 1"),
        "evaluation requests per CPU second / lm-eval's own": check(of_requests, ">= 1"),
        "accuracies that are lm-eval's": check(float(same), ">= 1"),
        f"resident memory after {trials} trials / after a tenth of them": check(growth, "<= 1.05"),
    }
    write("trial_throughput", rows, checks, seeds=[0], part=args.quick)
