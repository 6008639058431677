"""What a trial costs beyond its training, on SmolLM2-135M: beside a bare PyTorch and PEFT loop, and lm-eval's own runs.

    python benchmarks/trial_throughput.py [--quick] [--trials 100]

Trials of a study recover the model pruned by 25%. Measured in turns, so that other load on the machine meets both
sides: training tokens per second of a trial beside the plainest loop with the same adapters, batches and optimiser;
requests per second of an evaluation beside ``lm_eval.simple_evaluate`` on the same items. Then what is left of a
trial's time without its training (suggestion, adapter on and off, one held-out block, storage), and the memory of the
process over many short trials. The tasks are looked for in ``$RANKADAPTOR_DATA``, by default ``../shared/data``.
"""

from __future__ import annotations

import argparse
import time
from contextlib import chdir
from typing import Any

import numpy as np
import optuna
import psutil
import torch
from peft import get_peft_model
from pruning import data_folder
from results import check, show, write

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, RecoveryObjective
from rankadaptor_optuna.embedded import load_model, quiet
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.recovery.lora import lora_config
from rankadaptor_optuna.recovery.tasks import TaskSuite
from rankadaptor_optuna.recovery.train import TrainingConfig, batches
from rankadaptor_optuna.texts import load_texts

TASKS = ("local_arc_easy", "local_piqa")


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def bare(job: RecoveryObjective, ranks: dict[int, int]) -> float:
    """Tokens per second of the plainest loop that trains the same adapters on the same batches."""
    config = job.training
    model = get_peft_model(job.model, lora_config(ranks, **job.lora))
    try:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
        blocks = torch.tensor([list(ids) for ids in job.train.ids])
        model.train()
        start, tokens = time.perf_counter(), 0
        for rows in batches(len(blocks), config, 0):
            ids = blocks[rows]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            tokens += ids.numel()
        return tokens / (time.perf_counter() - start)
    finally:
        model.unload()


def training(job: RecoveryObjective, rounds: int) -> tuple[dict[str, Any], float]:
    """Tokens per second of a trial beside the bare loop, round by round."""
    ranks = job.space.with_fixed(job.space.uniform())
    study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, seed=0))
    ours, plain = [], []
    for i in range(rounds + 1):
        pair = [lambda: plain.append(bare(job, ranks)), lambda: study.optimize(job, n_trials=1)]
        for run in pair if i % 2 else pair[::-1]:
            run()
        ours.append(study.trials[-1].user_attrs["tokens_per_second"])
    ours, plain = ours[1:], plain[1:]  # the first round warms up
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    row = {"what": "training, tokens/s", "ours": spread(ours), "peer": spread(plain), "ratio": spread(ratios)}
    return row, float(np.median(ratios))


def overhead(model: Any, tokenizer: Any, space: RankSpace, texts: Any, rounds: int) -> tuple[dict[str, Any], float]:  # noqa: ANN401
    """Seconds of a trial, from the end of the one before, beyond those of its training."""
    job = objective(model, tokenizer, space, texts, TrainingConfig(steps=2, batch_size=2), blocks=1)
    study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(space, seed=0))
    ends: list[float] = []
    study.optimize(job, n_trials=rounds + 2, callbacks=[lambda study, trial: ends.append(time.perf_counter())])
    tokens = 2 * 2 * 256
    spent = np.asarray([tokens / t.user_attrs["tokens_per_second"] for t in study.trials[2:]])
    left = (np.diff(ends)[1:] - spent).tolist()
    row = {"what": "a trial without its training, s", "ours": spread(left)}
    return row, float(np.median(left))


def evaluation(model: Any, tokenizer: Any, limit: int, rounds: int) -> tuple[dict[str, Any], float, bool]:  # noqa: ANN401
    """Requests per second beside lm-eval's, and whether the accuracies agree."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = data_folder()
    with chdir(folder.parent.parent):  # their data files are named relative to it
        suite = TaskSuite(tokenizer, TASKS, limit=limit, include_path=str(folder / "tasks"))
        manager = TaskManager(include_defaults=False, include_path=str(folder / "tasks"))
        n_requests = len(suite._requests("loglikelihood"))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        ours, theirs = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            scores = suite.evaluate(model)
            ours.append(n_requests / (time.perf_counter() - start))
            start = time.perf_counter()
            seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
            found = simple_evaluate(
                lm, tasks=list(TASKS), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False, **seeds
            )
            theirs.append(n_requests / (time.perf_counter() - start))
    same = all(
        abs(found["results"][s.task].get("acc_norm,none", found["results"][s.task]["acc,none"]) - s.accuracy) < 1e-9
        for s in scores
    )
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    row = {"what": "evaluation, requests/s", "ours": spread(ours), "peer": spread(theirs), "ratio": spread(ratios)}
    return row, float(np.median(ratios)), same


def memory(model: Any, tokenizer: Any, space: RankSpace, texts: Any, trials: int) -> tuple[dict[str, Any], float]:  # noqa: ANN401
    """Resident memory in MiB over many trials of one step: after a tenth of them, and at the end."""
    job = objective(model, tokenizer, space, texts, TrainingConfig(steps=1, batch_size=1), blocks=1, length=64)
    study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(space, seed=0))
    resident: list[float] = []
    process = psutil.Process()
    study.optimize(
        job, n_trials=trials, callbacks=[lambda study, trial: resident.append(process.memory_info().rss / 2**20)]
    )
    first, last = resident[max(0, trials // 10 - 1)], resident[-1]
    row = {"what": f"resident MiB after {max(1, trials // 10)} and {trials} trials", "ours": f"{first:.0f}, {last:.0f}"}
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
    """A trial on the embedded text."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few rounds and trials")
    parser.add_argument("--trials", type=int, default=100, help="of the memory measurement")
    args = parser.parse_args()
    rounds, limit, trials = (2, 8, 10) if args.quick else (7, 40, args.trials)
    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = time.perf_counter()
    dense, tokenizer = load_model(dtype=torch.float32)
    loading = time.perf_counter() - start
    texts = load_texts()
    model = prune(dense, tokenizer, ratio=0.25, calibration=texts.train).model
    space = RankSpace.from_model(model, candidates=(2, 4, 6, 8, 10, 12), budget="uniform:8")
    job = objective(model, tokenizer, space, texts, TrainingConfig(steps=6, batch_size=2), blocks=1)
    rows: list[dict[str, Any]] = [{"what": "loading the model, once, s", "ours": f"{loading:.2g}"}]
    trained, ratio = training(job, rounds)
    left, seconds = overhead(model, tokenizer, space, texts, rounds)
    evaluated, of_requests, same = evaluation(model, tokenizer, limit, max(2, rounds // 2))
    kept, growth = memory(model, tokenizer, space, texts, trials)
    rows += [trained, left, evaluated, kept]
    show(rows)
    checks = {
        "training tokens/s of a trial / those of a bare loop": check(ratio, ">= 0.95"),
        "seconds of a trial beyond its training, with one held-out block": check(seconds, "<= 1"),
        "evaluation requests/s / lm-eval's own": check(of_requests, ">= 1"),
        "accuracies that are lm-eval's": check(float(same), ">= 1"),
        f"resident memory after {trials} trials / after a tenth of them": check(growth, "<= 1.05"),
    }
    write("trial_throughput_part" if args.quick else "trial_throughput", rows, checks, seeds=[0])


if __name__ == "__main__":
    main()
