"""Compare three ways to prune SmolLM2-135M with random pruning: quality of the model, order of importance, memory.

    python -m benchmarks.pruning [--quick] [--folder DIR]

Each method removes 20, 25, 30 and 50% of the blocks' parameters, calibrated on WikiText-2's validation part with its
default settings; perplexity is on WikiText-2's test part (first tokens, blocks of 512), accuracy on the first items of
three lm-eval tasks. Random pruning of the same units within the same layers has three seeds. No model is recovered.
Further: the rank correlation of the importance of heads and channels with the loss that their removal alone causes, and
the memory that a method needs beside the model. ``--folder`` keeps results: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import check, command_parser, show, write
from benchmarks.tasks.texts import data_file, lm_eval_tasks
from rankadaptor_optuna.jobs.output import OutputFolder
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.pruning.calibration import draw_samples
from rankadaptor_optuna.pruning.config import PRUNING_METHODS, Criterion
from rankadaptor_optuna.pruning.importance import unit_importance
from rankadaptor_optuna.pruning.methods import silenced
from rankadaptor_optuna.pruning.shortened import block_importance
from rankadaptor_optuna.pruning.slimgpt import slimgpt
from rankadaptor_optuna.pruning.structure import UnitType, layer_shape, transformer_layers
from rankadaptor_optuna.recovery.data import token_blocks
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.models import load_model, quiet
from rankadaptor_optuna.recovery.tasks import TaskSuite

TASKS = ("local_arc_easy", "local_piqa", "local_hellaswag")
RANDOM_SEEDS = (0, 1, 2)
RANDOM_OF = {"llm-pruner": "llm-pruner", "slimgpt": "llm-pruner", "shortened": "shortened"}


def evaluate(model: Any, tokenizer: Any, n_tokens: int, n_items: int) -> dict[str, Any]:  # noqa: ANN401
    """Returns perplexity, and accuracies if items are asked for; in bfloat16, which suffices here and is fast."""
    model = copy.deepcopy(model).bfloat16()
    text = data_file("wikitext2", "test.txt").read_text(encoding="utf-8")
    blocks = token_blocks(tokenizer, [text[: 8 * n_tokens]], 512)[: n_tokens // 512]
    found: dict[str, Any] = {"ppl": float(np.exp(block_losses(model, blocks).mean()))}
    if n_items:
        with lm_eval_tasks() as folder:
            suite = TaskSuite(tokenizer, TASKS, limit=n_items, include_path=folder)
        scores = suite.evaluate(model)
        found |= {score.task.removeprefix("local_"): score.accuracy for score in scores}
    return found


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        tokens: Number of tokens that the perplexity is measured on.
        items: Number of items per task.
        ratios: Shares of the blocks' parameters to remove.
        n_samples: Number of calibration samples. Default: each method's.
    """

    tokens: int = 16384
    items: int = 80
    ratios: tuple[float, ...] = (0.2, 0.25, 0.3, 0.5)
    n_samples: int | None = None


def quality(out: OutputFolder, size: Size) -> tuple[list[Any], dict[str, Any]]:
    """Returns a row for each method and ratio, and the checks."""
    dense, tokenizer = load_model(dtype=torch.float32)
    calibration = str(data_file("wikitext2", "validation.txt"))

    def run(method: str, ratio: float, criterion: str | None, seed: int, items: int) -> dict[str, Any]:
        start = time.process_time()
        chosen: dict[str, Any] = {
            "method": method,
            "ratio": ratio,
            "criterion": criterion,
            "n_samples": size.n_samples,
            "seed": seed,
        }
        pruned = prune(dense, tokenizer, calibration=calibration, **chosen)
        seconds = time.process_time() - start
        found = evaluate(pruned.model, tokenizer, size.tokens, items)
        return {"removed": pruned.parameters_removed, "CPU s": seconds, **found}

    rows: list[dict[str, Any]] = [
        {"method": "dense", **out.measure("dense", lambda: evaluate(dense, tokenizer, size.tokens, size.items))}
    ]
    against: list[float] = []
    off: list[float] = []
    for ratio in size.ratios:
        by: dict[str, dict[str, Any]] = {}
        for method in ("llm-pruner", "slimgpt", "shortened"):
            key = f"{method}-{ratio}"
            by[method] = out.measure(key, partial(run, method, ratio, None, 0, size.items))
        for method in ("llm-pruner", "shortened"):
            for seed in RANDOM_SEEDS:
                items = size.items if seed == 0 else 0
                key = f"random-{method}-{ratio}-{seed}"
                by[f"random {method} {seed}"] = out.measure(key, partial(run, method, ratio, "random", seed, items))
        for method, peer in RANDOM_OF.items():
            lowest = min(by[f"random {peer} {seed}"]["ppl"] for seed in RANDOM_SEEDS)
            against.append(by[method]["ppl"] / lowest)
        off += [abs(by[m]["removed"] - ratio) for m in ("llm-pruner", "slimgpt")]
        rows += [{"method": method, "asked": ratio, **found} for method, found in by.items()]
    checks = {
        "perplexity / that of the luckiest random pruning, worst method and ratio": check(max(against), "<= 0.8"),
        "removed, points off the ratio, heads and channels": check(100 * max(off), "<= 0.5"),
    }
    return rows, checks


def predicted_order(out: OutputFolder, n_layers: int) -> list[dict[str, Any]]:
    """Returns the rank correlation of importance with the loss that a removal causes, for heads and channels.

    Channels are removed in groups: an eighth of a layer's channels, of similar importance by ``param_first``.
    """
    model, tokenizer = load_model(dtype=torch.float32)
    text = data_file("wikitext2", "validation.txt").read_text(encoding="utf-8")
    samples = draw_samples(tokenizer, [text], n_samples=10, sample_length=128, seed=0)
    layers = transformer_layers(model)
    chosen = np.linspace(1, len(layers) - 2, n_layers).round().astype(int).tolist()
    first = unit_importance(model, samples, chosen)["channels"]
    groups: dict[UnitType, dict[int, list[list[int]]]] = {
        "heads": {layer: [[unit] for unit in range(layer_shape(layers[layer]).heads)] for layer in chosen},
        "channels": {layer: [part.tolist() for part in first[layer].argsort().chunk(8)] for layer in chosen},
    }

    def losses() -> dict[str, list[float]]:
        whole = block_losses(model, samples).mean()
        found: dict[str, list[float]] = {kind: [] for kind in groups}
        for kind, by_layer in groups.items():
            for layer, parts in by_layer.items():
                units = range(layer_shape(layers[layer]).count(kind))
                for part in parts:
                    with silenced(model, {kind: {layer: sorted(set(units) - set(part))}}):
                        found[kind].append(float(block_losses(model, samples).mean() - whole))
        return found

    measured = out.measure(f"removal-{n_layers}", losses)
    rows = []
    for criterion in get_args(Criterion):
        importance = unit_importance(model, samples, chosen, criterion=criterion)
        row: dict[str, Any] = {"criterion": criterion}
        for kind, by_layer in groups.items():
            values = [float(importance[kind][layer][part].sum()) for layer in by_layer for part in by_layer[layer]]
            result = stats.spearmanr(values, measured[kind])
            row |= {f"{kind}, rank correlation": f"{result.statistic:.2f}", f"{kind} p": f"{result.pvalue:.1g}"}
        rows.append(row)
    return rows


def resident(field: str) -> int:
    """Returns this process's memory now ("VmRSS") or its peak ("VmHWM"), in KiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak(method: str, hidden: int, n_layers: int) -> dict[str, float]:
    """Returns MiB of a random LLaMA, of one of its blocks, and of a method beside it; for a process of its own."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden // 64,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    samples = torch.randint(0, 2048, (10, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(samples[:1])  # memory that any forward pass takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which building the model has raised
    before = resident("VmRSS")
    states, waiting = 2, 0  # tensors that stay in main memory when the model is on an accelerator
    if method == "llm-pruner":
        unit_importance(model, samples, range(n_layers))
        states = n_layers + 1
    elif method == "shortened":
        block_importance(model, samples, range(n_layers))
    else:
        found = slimgpt(model, samples, range(n_layers), ratio=0.25, multiple_of=32)
        waiting = sum(weight.numel() for weight in found.weights.values())
    after = resident("VmHWM")
    waiting += states * samples.numel() * hidden
    size = [sum(p.numel() for p in m.parameters()) * 4 / 2**20 for m in (model, transformer_layers(model)[0])]
    beside = (after - before) / 1024
    return {"model": size[0], "block": size[1], "beside": beside, "on the device": beside - waiting * 4 / 2**20}


def _peak_in_a_process(method: str, hidden: int, n_layers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.pruning", "--peak", f"{method},{hidden},{n_layers}"]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # freed memory is returned at once
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | at_once)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def memory(out: OutputFolder, quick: bool) -> tuple[list[Any], dict[str, Any]]:
    """Measures memory beside the model at several widths and depths; projects it for 7 billion parameters."""
    shapes = [(256, 4), (256, 16)] if quick else [(512, 4), (512, 8), (512, 16), (768, 8), (1024, 8)]
    rows, checks = [], {}
    block = 4 * (4 * 4096**2 + 3 * 4096 * 11008) / 2**30  # GiB in float32
    for method in PRUNING_METHODS:
        found = []
        for hidden, n_layers in shapes:
            key = f"peak-{method}-{hidden}-{n_layers}"
            found.append(out.measure(key, partial(_peak_in_a_process, method, hidden, n_layers)))
            sizes = {key: f"{value:.0f} MiB" for key, value in found[-1].items()}
            rows.append(
                {
                    "method": method,
                    "hidden": hidden,
                    "layers": n_layers,
                    **sizes,
                    "in blocks": f"{found[-1]['on the device'] / found[-1]['block']:.1f}",
                }
            )
        in_blocks = max(f["on the device"] / f["block"] for f in found)
        needed = 2 * 6.74e9 / 2**30 + in_blocks * block
        rows.append(
            {
                "method": method,
                "hidden": 4096,
                "layers": 32,
                "model": f"{2 * 6.74e9 / 2**30:.1f} GiB in 16 bit",
                "block": f"{block:.2f} GiB",
                "on the device": f"{in_blocks * block:.1f} GiB projected",
            }
        )
        checks[f"{method}: GiB projected for LLaMA-7B in 16 bit"] = check(needed, "<= 24")
    return rows, checks


def main() -> None:
    """Measures, prints tables and writes results/pruning.json."""
    parser = command_parser(__doc__, "one ratio, few tokens, items and calibration samples, smaller models")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "pruning", help="results so far")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        method, hidden, n_layers = args.peak.split(",")
        print(json.dumps(peak(method, int(hidden), int(n_layers))))
        return
    quiet()
    size = Size(2048, 4, (0.25,), n_samples=4) if args.quick else Size()
    out = OutputFolder(args.folder / ("quick" if args.quick else "full"), {"size": json.dumps(asdict(size))})
    rows, checks = quality(out, size)
    show([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    order = predicted_order(out, 2 if args.quick else 14)
    show(order)
    memory_rows, more = memory(out, args.quick)
    show(memory_rows)
    seeds = {"calibration": 0, "random": RANDOM_SEEDS}
    write("pruning", [*rows, *order, *memory_rows], checks | more, seeds=seeds, part=args.quick, size=asdict(size))
