"""Repeat the paper's ablations (its Table 3) on byte-level LLaMAs, whose recoveries take a CPU second each.

    python -m benchmarks.paper_ablations [--quick] [--folder DIR]

* Sample size: LLM-Pruner calibrated on 10 or 50 samples. Element: its importance by the first or the second order of
  the Taylor expansion (``param_first``, ``param_second``). Each pruned model, one per calibration seed, is searched,
  and the recommended ranks recover it on fresh seeds and text.
* Micro batches of 4, 8 or 16 of a batch of 16: the gradients of a batch add up exactly, so only rounding may differ.
* Performance model: the paper's MLP with inner layers 32-32-32, 32-64-32 or 32-16-32, and the package's model, each
  trained on the same 10 or 50 trials of random allocations and asked for the best of the same candidates.

Only development tasks are used, which the race does not run on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy import stats

from benchmarks.report import FRESH, cell, check, command_parser, set_up, show, write
from benchmarks.tasks.losses import Losses
from benchmarks.tasks.models import dense_model, taylor_pruned
from benchmarks.tasks.ranks import random_ranks, weighted_ranks
from benchmarks.tasks.recovery import RecoveryTask, load_task
from benchmarks.tasks.specs import DEVELOPMENT, TINY, TaskSpec
from benchmarks.tasks.texts import LENGTH
from rankadaptor_optuna import PerformanceModel, RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.train import TrainingConfig, train

PRUNINGS: dict[str, dict[str, Any]] = {
    "10 samples, first order": {"n_samples": 10, "criterion": "param_first"},
    "50 samples, first order": {"n_samples": 50, "criterion": "param_first"},
    "10 samples, second order": {"n_samples": 10, "criterion": "param_second"},
}
MODELS: dict[str, dict[str, Any]] = {
    "ours": {},
    "MLP 32-32-32": {"mode": "paper", "hidden": (32, 32, 32)},
    "MLP 32-64-32": {"mode": "paper", "hidden": (32, 64, 32)},
    "MLP 32-16-32": {"mode": "paper", "hidden": (32, 16, 32)},
}
MICRO_BATCHES = (4, 8, 16)
N_CANDIDATES = 500  # random allocations, and as many smooth ones, that a performance model chooses from
N_RANKED = 32  # allocations whose order it should predict


def recalibrated(spec: TaskSpec, seed: int, cache: Path | None = None, **options: Any) -> Any:  # noqa: ANN401
    """Returns the dense model of a task, pruned by LLM-Pruner with these options on samples of this seed."""
    from transformers import LlamaForCausalLM

    dense, parts, _ = dense_model(spec.dense, cache)
    return taylor_pruned(LlamaForCausalLM.from_pretrained(dense), spec.damage, parts.pretraining, seed=seed, **options)


def recommended_ranks(space: RankSpace, losses: Losses, n_trials: int, seed: int) -> Ranks:
    """Returns the recommendation of a search with the sampler; known losses are not computed again."""
    study = optuna.create_study(sampler=RankAdaptorSampler(space, seed=seed))
    for _ in range(n_trials):
        trial = study.ask()
        study.tell(trial, losses([(space.suggest(trial), seed)])[0])
    return recommend(study).ranks


def prunings(
    spec: TaskSpec, folder: Path, seeds: int, n_trials: int, cache: Path | None = None
) -> list[dict[str, Any]]:
    """Measures sample size and element: losses on fresh seeds and text over calibration seeds."""
    _, parts, dense_loss = dense_model(spec.dense, cache)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (name, options), seed in itertools.product(PRUNINGS.items(), range(seeds)):
        task = RecoveryTask(spec, recalibrated(spec, seed, cache, **options), dense_loss, parts)
        losses = Losses(task, folder / f"{spec.name}-{name.replace(', ', '-').replace(' ', '-')}-{seed}.csv")
        ranks = recommended_ranks(task.space, losses, n_trials, seed)
        uniform, ours = (
            float(np.mean(losses([(chosen, fresh) for fresh in FRESH], report=True)))
            for chosen in (task.space.uniform(), ranks)
        )
        found.setdefault(name, []).append((task.pruned_loss, uniform, ours))
        print(f"{name}, calibration seed {seed}: {losses.n_computed} recoveries", flush=True)
    base = np.asarray(next(iter(found.values())))
    rows = []
    for name, values in found.items():
        pruned, uniform, ours = np.transpose(values).tolist()
        less = (np.asarray(values) - base)[:, 2].tolist()
        rows.append(
            {
                "pruning": name,
                "no recovery": cell(pruned, 4),
                "LoRA, uniform": cell(uniform, 4),
                "RankAdaptor": cell(ours, 4),
                "RankAdaptor less uniform": cell(np.subtract(ours, uniform).tolist(), 4, "+"),
                "less the first row": cell(less, 4, "+") if name != next(iter(found)) else "",
                "values": values,
            }
        )
    return rows


def micro_batches(spec: TaskSpec, cache: Path | None = None, steps: int = 8) -> tuple[list[dict[str, Any]], float]:
    """Returns losses after recoveries on examples of unequal lengths, by micro batch, and the widest difference."""
    model = recalibrated(spec, 0, cache, n_samples=10)
    _, parts, _ = dense_model(spec.dense, cache)
    stream = torch.tensor(list("".join(parts.recovery[:20]).encode()))
    lengths = np.random.default_rng(0).integers(8, LENGTH, 64).tolist()
    ids = list(torch.split(stream[: sum(lengths)], lengths))
    held_out = torch.tensor(list("".join(parts.report).encode()))[: 64 * LENGTH].view(64, LENGTH)
    space = RankSpace.from_model(model, spec.candidates, spec.budget, unpruned_rank=spec.unpruned_rank)
    found = []
    for size in MICRO_BATCHES:
        config = TrainingConfig(steps, 16, spec.recovery.learning_rate, micro_batch_size=size)
        with attached(model, lora_config(space.with_fixed(space.uniform())), seed=0) as adapted:
            train(adapted, Examples(ids, ids), config, seed=0)
            found.append(float(block_losses(adapted, held_out).mean()))
    rows = [{"micro batch": size, "loss": f"{loss:.7f}"} for size, loss in zip(MICRO_BATCHES, found, strict=True)]
    return rows, max(found) - min(found)


def candidates_of(space: RankSpace, rng: np.random.Generator) -> list[Ranks]:
    """Returns random allocations, uniform ranks, and smooth allocations, as most good allocations are smooth."""
    depth = np.linspace(-1, 1, len(space.layers))
    shapes = rng.normal(size=(N_CANDIDATES, 4)) @ [np.cos(k * np.pi * (depth + 1) / 2) for k in range(1, 5)]
    smooth = [weighted_ranks(space, np.exp(shape) * space.costs) for shape in shapes]
    return [*(random_ranks(space, rng) for _ in range(N_CANDIDATES)), space.uniform(), *smooth]


def performance_models(
    task: RecoveryTask, losses: Losses, seeds: int, numbers: Sequence[int] = (10, 50)
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Returns, by model and number of trials, the rank correlation on other allocations and the gain of its choice.

    A seed draws the trials and seeds their recoveries; gains over uniform are nats, on fresh seeds and text.
    """
    space = task.space
    candidates = candidates_of(space, np.random.default_rng(12345))
    matrix = np.asarray([list(ranks.values()) for ranks in candidates], dtype=float)
    truth = losses([(ranks, FRESH[0]) for ranks in candidates[:N_RANKED]], report=True)
    uniform = losses([(space.uniform(), fresh) for fresh in FRESH], report=True)
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for seed in range(seeds):
        draw = np.random.default_rng([1, seed])
        trials = [space.uniform(), *(random_ranks(space, draw) for _ in range(max(numbers) - 1))]
        scores = losses([(ranks, seed) for ranks in trials])
        ranks = np.asarray([list(one.values()) for one in trials], dtype=float)
        for (name, options), n in itertools.product(MODELS.items(), numbers):
            settings = {"seed": seed, **options} if options else {}
            model = PerformanceModel(space, direction="minimize", **settings)
            model.update(ranks[:n], scores[:n])
            predicted = model.predict(matrix)[0]
            chosen = candidates[int(predicted.argmin())]
            gain = np.subtract(uniform, losses([(chosen, fresh) for fresh in FRESH], report=True)).mean()
            those = found.setdefault((name, n), {"order": [], "gain": []})
            order = stats.spearmanr(predicted[:N_RANKED], truth).statistic
            those["order"].append(float(np.nan_to_num(order)))  # constant predictions have none
            those["gain"].append(float(gain))
    return found


def model_rows(task: str, found: Mapping[tuple[str, int], Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Returns a row per model and number of trials, with the paired difference to the paper's first setting."""
    rows = []
    for (name, n), values in found.items():
        row = {
            "task": task,
            "performance model": name,
            "trials": n,
            "rank correlation": cell(values["order"]),
            "gain over uniform": cell(values["gain"], 4, "+"),
            "gain less 32-32-32's": "",
            "values": values,
        }
        if name != "MLP 32-32-32":
            less = np.subtract(values["gain"], found["MLP 32-32-32", n]["gain"]).tolist()
            row["gain less 32-32-32's"] = cell(less, 4, "+")
        rows.append(row)
    return rows


def main() -> None:
    """Runs the ablations, prints a table each and writes results/paper_ablations.json."""
    parser = command_parser(__doc__, "two seeds, few trials, a tiny task")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "paper_ablations", help="losses")
    args = parser.parse_args()
    set_up()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    seeds, n_trials, numbers = (2, 4, (5, 8)) if args.quick else (10, 25, (10, 50))
    specs = (TINY,) if args.quick else DEVELOPMENT
    recoveries = len(PRUNINGS) * seeds * (n_trials + 6)
    recoveries += len(specs) * (N_RANKED + seeds * (max(numbers) + 3 * len(MODELS) * len(numbers)))
    print(f"At most {recoveries} recoveries, about a CPU second each: {recoveries / 3600:.1f} CPU hours.", flush=True)
    parts: dict[str, list[dict[str, Any]]] = {}
    parts["pruning"] = prunings(specs[0], folder, seeds, n_trials)
    parts["micro batch"], widest = micro_batches(specs[0])
    checks: dict[str, Any] = {"micro batches of 4, 8 and 16, widest difference in loss": check(widest, "<= 0.0001")}
    parts["performance model"] = []
    for spec in specs:
        task = load_task(spec)
        found = performance_models(task, Losses(task, folder / f"{spec.name}.csv"), seeds, numbers)
        parts["performance model"] += model_rows(spec.name, found)
        ours, theirs = (found[name, numbers[-1]]["gain"] for name in ("ours", "MLP 32-32-32"))
        name = f"{spec.name}: gain of our model less the paper's MLP's, {numbers[-1]} trials"
        checks[name] = check(float(np.subtract(ours, theirs).mean()), ">= 0")
    for rows in parts.values():
        show([{key: value for key, value in row.items() if key != "values"} for row in rows])
        print()
    write(
        "paper_ablations",
        [{"part": part, **row} for part, rows in parts.items() for row in rows],
        checks,
        seeds={"calibration and search": list(range(seeds)), "fresh": FRESH},
        tasks=[asdict(spec) for spec in specs],
        trials=n_trials,
        part=args.quick,
    )
