"""Three ways to prune SmolLM2-135M, beside random pruning: what is left of it, what was removed, at what cost.

    python -m benchmarks.pruning [--quick] [--folder DIR]

Each method removes 20, 25, 30 and 50% of the blocks' parameters, calibrated on WikiText-2's validation part with its
default settings; perplexity is on WikiText-2's test part (first tokens, blocks of 512), accuracy on the first items of
three lm-eval tasks. Random pruning of the same units within the same layers has three seeds. Nothing is recovered
afterwards. Then: does the importance of a head predict what its removal does to the loss, and how does the memory that
a method needs beside the model grow with the model? Results are kept in ``--folder``: a run that was stopped goes on.
The texts and tasks are looked for in ``$RANKADAPTOR_DATA``, by default ``../shared/data`` beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import check, show, write
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.pruning.calibration import draw_samples
from rankadaptor_optuna.pruning.config import METHODS
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

RATIOS = (0.2, 0.25, 0.3, 0.5)
TASKS = ("local_arc_easy", "local_piqa", "local_hellaswag")
RANDOM_SEEDS = (0, 1, 2)
RANDOM_OF = {"llm-pruner": "llm-pruner", "slimgpt": "llm-pruner", "shortened": "shortened"}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def data_folder() -> Path:
    """Where the texts and tasks are."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RANKADAPTOR_DATA") or default)
    if not (folder / "wikitext2").is_dir():
        raise SystemExit(f"{folder} holds no wikitext2; set RANKADAPTOR_DATA to the folder that holds the texts.")
    return folder


class Kept:
    """Results by name, as JSON in a folder; each is computed once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:  # noqa: ANN401
        """The result of this name, computed if it is not there."""
        file = self._folder / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(compute()))
        return json.loads(file.read_text())


def measure(model: Any, tokenizer: Any, n_tokens: int, n_items: int) -> dict[str, Any]:  # noqa: ANN401
    """Perplexity, and accuracy if items are asked for; in bfloat16, which suffices here and is fast."""
    model = copy.deepcopy(model).bfloat16()
    folder = data_folder()
    text = (folder / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    blocks = token_blocks(tokenizer, [text[: 8 * n_tokens]], 512)[: n_tokens // 512]
    found: dict[str, Any] = {"ppl": float(np.exp(block_losses(model, blocks).mean()))}
    if n_items:
        with chdir(folder.parent.parent):  # their data files are named relative to it
            suite = TaskSuite(tokenizer, TASKS, limit=n_items, include_path=str(folder / "tasks"))
        scores = suite.evaluate(model)
        found |= {score.task.removeprefix("local_"): score.accuracy for score in scores}
    return found


def table(kept: Kept, n_tokens: int, n_items: int, ratios: tuple[float, ...]) -> tuple[list[Any], dict[str, Any]]:
    """One row for each method and ratio, and the checks."""
    dense, tokenizer = load_model(dtype=torch.float32)
    calibration = str(data_folder() / "wikitext2" / "validation.txt")

    def run(method: str, ratio: float, criterion: str | None, seed: int, items: int) -> dict[str, Any]:
        start = time.process_time()
        pruned = prune(
            dense, tokenizer, method=method, ratio=ratio, criterion=criterion, calibration=calibration, seed=seed
        )
        seconds = time.process_time() - start
        found = measure(pruned.model, tokenizer, n_tokens, items)
        return {"removed": pruned.parameters_removed, "CPU s": seconds, **found}

    rows: list[dict[str, Any]] = [
        {"method": "dense", **kept("dense", lambda: measure(dense, tokenizer, n_tokens, n_items))}
    ]
    against: list[float] = []
    off: list[float] = []
    for ratio in ratios:
        by: dict[str, dict[str, Any]] = {}
        for method in ("llm-pruner", "slimgpt", "shortened"):
            key = f"{method}-{ratio}"
            by[method] = kept(key, lambda m=method, r=ratio: run(m, r, None, 0, n_items))
        for method in ("llm-pruner", "shortened"):
            for seed in RANDOM_SEEDS:
                items = n_items if seed == 0 else 0
                key = f"random-{method}-{ratio}-{seed}"
                by[f"random {method} {seed}"] = kept(
                    key, lambda m=method, r=ratio, s=seed, i=items: run(m, r, "random", s, i)
                )
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


def predicted_order(kept: Kept, n_layers: int) -> list[dict[str, Any]]:
    """Rank correlation of the importance of heads and groups of channels with what their removal does to the loss.

    A group is an eighth of a layer's channels, those of like importance by ``param_first``.
    """
    model, tokenizer = load_model(dtype=torch.float32)
    text = (data_folder() / "wikitext2" / "validation.txt").read_text(encoding="utf-8")
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

    measured = kept(f"removal-{n_layers}", losses)
    rows = []
    for criterion in METHODS["llm-pruner"].criteria:
        importance = unit_importance(model, samples, chosen, criterion=criterion)
        row: dict[str, Any] = {"criterion": criterion}
        for kind, by_layer in groups.items():
            values = [float(importance[kind][layer][part].sum()) for layer in by_layer for part in by_layer[layer]]
            result = stats.spearmanr(values, measured[kind])
            row |= {f"{kind}, rank correlation": f"{result.statistic:.2f}", f"{kind} p": f"{result.pvalue:.1g}"}
        rows.append(row)
    return rows


def resident(field: str) -> int:
    """This process's memory now ("VmRSS") or at most so far ("VmHWM"), in KiB; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak(method: str, hidden: int, n_layers: int) -> dict[str, float]:
    """MiB of a random LLaMA, of one block of it, and that a method takes beside it; for a process of its own."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden // 64,
    )
    model = LlamaForCausalLM(config).eval()
    samples = torch.randint(0, 2048, (10, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(samples[:1])  # what a forward pass takes anyway
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here: building the model had its own
    before = resident("VmRSS")
    states, waiting = 2, 0  # what waits in main memory when the model is on an accelerator
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


def memory(kept: Kept, quick: bool) -> tuple[list[Any], dict[str, Any]]:
    """Memory beside the model, at several widths and depths, and what that means for 7 billion parameters."""
    shapes = [(256, 4), (256, 16)] if quick else [(512, 4), (512, 8), (512, 16), (768, 8), (1024, 8)]
    rows, checks = [], {}
    block = 4 * (4 * 4096**2 + 3 * 4096 * 11008) / 2**30  # GiB in float32
    for method in METHODS:
        found = []
        for hidden, n_layers in shapes:

            def measured(arguments: tuple[Any, ...] = (method, hidden, n_layers)) -> Any:  # noqa: ANN401
                command = [sys.executable, "-m", "benchmarks.pruning", "--peak", ",".join(map(str, arguments))]
                own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # what is freed goes back
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | own)
                return json.loads(done.stdout)

            found.append(kept(f"peak-{method}-{hidden}-{n_layers}", measured))
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one ratio, few tokens and items, smaller models")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "pruning", help="results so far")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        method, hidden, n_layers = args.peak.split(",")
        print(json.dumps(peak(method, int(hidden), int(n_layers))))
        return
    quiet()
    kept = Kept(args.folder / ("quick" if args.quick else "full"))
    n_tokens, n_items, ratios = (2048, 8, (0.25,)) if args.quick else (16384, 80, RATIOS)
    rows, checks = table(kept, n_tokens, n_items, ratios)
    show([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    order = predicted_order(kept, 2 if args.quick else 14)
    show(order)
    memory_rows, more = memory(kept, args.quick)
    show(memory_rows)
    name = "pruning_part" if args.quick else "pruning"
    write(
        name,
        [*rows, *order, *memory_rows],
        checks | more,
        seeds={"calibration": 0, "random": RANDOM_SEEDS},
        tokens=n_tokens,
        items_per_task=n_items,
    )


if __name__ == "__main__":
    main()
