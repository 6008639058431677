"""Repeat the paper's table on SmolLM2-135M: pruned, recovered on Alpaca in six ways, scored on seven tasks.

    python -m benchmarks.paper_table [--quick] [--size cpu|gpu] [--blocks NAME ...] [--folder DIR]

A block is a pruning method and the share of the blocks' parameters that it removes: 20 and 50% by LLM-Pruner (its
published settings, each layer alike) and by Shortened. In each block, ranks are searched on held-out loss; then the
recommended ranks recover the model on fresh seeds beside LoRA of uniform rank, AdaLoRA, EVA and ranks in proportion to
Fisher information, all on the same data in the same order, none with more parameters than uniform rank 8. Loss is on
Alpaca's validation file, accuracy on the halves of the tasks that are kept for reports; a search sees neither.

Mean and 95% t interval over the fresh seeds, and the paired differences to RankAdaptor: an interval that excludes 0 is
a win or a loss, any other a tie; p by a paired t test, also with Holm's correction for all comparisons. The seeds share
one pruned model, one search and the same items; other items move an average by the standard error that is printed.

``--folder`` keeps finished work, so that a stopped run goes on; blocks of the same size that the results already have
stay in the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.report import FOLDER, cell, check, command_parser, interval, show, write
from benchmarks.tasks.texts import data_folder, lm_eval_tasks
from rankadaptor_optuna.jobs.compare import compare
from rankadaptor_optuna.jobs.recipe import PRESETS, Recipe
from rankadaptor_optuna.jobs.results import COMPARED_METHODS, OURS, UNIFORM, Row
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.jobs.settings import Data, Pruning
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.recovery.models import quiet
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.surrogate.statistics import alike

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
BLOCKS = {f"{method}-{ratio}": (method, ratio) for ratio in (0.2, 0.5) for method in ("llm-pruner", "shortened")}
TRAINED, SCORED = 300, 1000  # tokens per second on two cores in bfloat16, roughly, for the estimate of the hours
TOKENS_PER_ITEM = 180  # of a task, with all its choices, roughly
REPORTED = 200  # records of Alpaca's validation file
TOLERANCE = 0.005  # of the budget

Rows = Sequence[Row]
Blocks = Mapping[str, Rows]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        trials: Number of trials of a search.
        seeds: Number of fresh seeds of each way to recover.
        items: Number of items of each task; None for all that are kept for reports.
        steps: Optimiser steps of a recovery.
        batch_size: Examples per step.
        micro_batch_size: Examples per forward pass.
        length: Most tokens of an example.
        records: Number of Alpaca records, of which every tenth is held out; also the most records to report on.
        validation: Number of held-out records that a trial is scored on.
        dtype: Dtype of the frozen model.
    """

    trials: int = 20
    seeds: int = 3
    items: int | None = 50
    steps: int = 24
    batch_size: int = 4
    micro_batch_size: int = 4
    length: int = 128
    records: int = 2000
    validation: int = 60
    dtype: str = "bfloat16"

    @property
    def hours(self) -> float:
        """Rough number of hours that a block takes on two cores; pruning itself takes minutes at most."""
        recovery = self.steps * self.batch_size * self.length / TRAINED
        trial = recovery + self.validation * self.length / SCORED
        items = len(TASKS) * (self.items or 250) * TOKENS_PER_ITEM
        measured = (items + min(self.records, REPORTED) * self.length) / SCORED
        recoveries = (len(COMPARED_METHODS) - 1) * self.seeds
        return (self.trials * trial + recoveries * (recovery + measured) + measured) / 3600


SIZES = {
    "cpu": Size(),
    "gpu": Size(
        trials=50, items=None, steps=250, batch_size=64, micro_batch_size=16, length=256, records=8000, validation=720
    ),
    "quick": Size(2, 2, 3, steps=4, batch_size=2, length=64, records=40, validation=4),
}


def recipe_of(block: str, size: Size, model: str = "embedded") -> Recipe:
    """Returns the recipe of a block's trials; without tasks, which only the comparison needs."""
    method, ratio = BLOCKS[block]
    folder = data_folder()
    calibration = str(folder / "wikitext2" / "validation.txt")
    pruning = Pruning(method=method, ratio=ratio, calibration=calibration)
    if method == "llm-pruner":
        published = PRESETS["paper"].pruning
        # the default for 30 layers keeps 4 and 2 whole
        pruning = replace(published, ratio=ratio, calibration=calibration, keep_first=None, keep_last=None)
    alpaca = folder / "alpaca"
    return Recipe(
        model=model,
        dtype=size.dtype,
        pruning=pruning,
        data=Data(
            train=str(alpaca / "train.jsonl"),
            report=str(alpaca / "validation.jsonl"),
            block_length=size.length,
            validation_blocks=size.validation,
            limit=size.records,
        ),
        training=TrainingConfig(size.steps, size.batch_size, micro_batch_size=size.micro_batch_size),
    )


def run_block(block: str, recipe: Recipe, size: Size, folder: Path, tasks: Sequence[str] = TASKS) -> list[Row]:
    """Searches a block and compares the recoveries, or goes on with it.

    Raises:
        ValueError: The folder holds the block at another size.
    """
    out = folder.resolve() / block

    def say(line: str) -> None:
        print(f"{block}: {line}", flush=True)

    search(recipe, out / "search", trials=size.trials, say=say)
    with lm_eval_tasks() as task_folder:
        return compare(
            f"sqlite:///{(out / 'search' / 'study.db').as_posix()}",
            "search",
            out / f"after-{size.trials}",
            pruned=out / "search" / "pruned",
            seeds=size.seeds,
            tasks=[f"local_{task}" for task in tasks],
            include_path=task_folder,
            limit=size.items,
            trust_study=True,
            say=say,
        ).rows


def finished_block(block: str, size: Size, file: Path) -> list[Row]:
    """Returns a block from an earlier run's results; empty where it is missing or of another size."""
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("size") != asdict(size):
        return []
    names = {field.name for field in fields(Row)}
    those = [measured for measured in found["measured"] if measured["block"] == block]
    return [Row(**{name: measured[name] for name in names & measured.keys()}) for measured in those]


def averages(row: Row) -> list[float]:
    """Returns the mean accuracy over the tasks, by seed."""
    means: list[float] = np.mean(list(row.accuracies.values()), axis=0).tolist()
    return means


def _percent(values: Sequence[float], digits: int) -> str:
    return cell(np.multiply(values, 100).tolist(), digits)


def table_rows(blocks: Blocks) -> list[dict[str, Any]]:
    """Returns a row for each block and way to recover: accuracies in %, loss in nats per target."""
    lines = []
    for block, rows in blocks.items():
        budget = _row(rows, UNIFORM).parameters
        for row in rows:
            tasks = {task.removeprefix("local_"): _percent(values, 1) for task, values in row.accuracies.items()}
            lines.append(
                {
                    "block": block,
                    "recovery": row.method,
                    **tasks,
                    "average": _percent(averages(row), 2),
                    "loss": cell(row.losses, 4),
                    "parameters": f"{row.parameters:,}",
                    "of budget": f"{row.parameters / budget:.1%}",
                    "seconds": f"{row.seconds:.0f}",
                }
            )
    return lines


def _row(rows: Rows, method: str) -> Row:
    return next(row for row in rows if row.method == method)


def paired(blocks: Blocks) -> list[dict[str, Any]]:
    """Returns differences of RankAdaptor to each other row on the same seeds, in loss and average accuracy.

    The row without recovery has no seeds: each seed is paired with the same number. Holm's correction is over all
    comparisons by the same measure.
    """
    found: list[dict[str, Any]] = []
    for measure, sign in (("loss", -1), ("average", 1)):
        those: list[dict[str, Any]] = []
        for block, rows in blocks.items():
            ours, *others = (_row(rows, method) for method in (OURS, *COMPARED_METHODS[:-1]))
            for other in others:
                mine, theirs = (r.losses if measure == "loss" else averages(r) for r in (ours, other))
                difference = np.subtract(mine, theirs)  # of one number or of one for each seed
                mean, half = interval(difference.tolist())
                gain = 0 if alike(difference) else sign * mean
                those.append(
                    {
                        "block": block,
                        "measure": measure,
                        "RankAdaptor less": other.method,
                        "difference": mean,
                        "half width": half,
                        "better on": f"{int((sign * difference > 0).sum())} of {len(difference)}",
                        "p": _p(difference),
                        "verdict": "win" if gain - half > 0 else "loss" if gain + half < 0 else "tie",
                    }
                )
        for one, p in zip(those, holm([one["p"] for one in those]), strict=True):
            one["p, Holm"] = p
        found += those
    return found


def _p(difference: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return 1.0 if alike(difference) else float(stats.ttest_1samp(difference, 0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p values."""
    order = np.argsort(p)
    raised = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(raised, 1)
    return adjusted.tolist()


def counted(differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns wins, ties and losses over the blocks against each other row, and the mean difference."""
    lines = []
    for measure in ("loss", "average"):
        for method in COMPARED_METHODS[:-1]:
            those = [d for d in differences if (d["measure"], d["RankAdaptor less"]) == (measure, method)]
            verdicts = [d["verdict"] for d in those]
            mean, half = interval([d["difference"] for d in those])
            lines.append(
                {
                    "measure": measure,
                    "RankAdaptor against": method,
                    "wins": verdicts.count("win"),
                    "ties": verdicts.count("tie"),
                    "losses": verdicts.count("loss"),
                    "mean difference over blocks": f"{mean:+.4f}" + (f" ±{half:.4f}" if len(those) > 1 else ""),
                }
            )
    return lines


def item_error(rows: Rows, items: int) -> float:
    """Returns the standard error of an average accuracy that is due to drawing ``items`` items per task."""
    p = np.asarray([np.mean(values) for values in _row(rows, OURS).accuracies.values()])
    return float(np.sqrt((p * (1 - p) / items).sum()) / len(p))


def checks_of(blocks: Blocks, differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Goals: RankAdaptor never worse than uniform, better than it in most blocks; nothing over the budget."""
    against = [d for d in differences if d["RankAdaptor less"] == UNIFORM]
    n, most = len(blocks), (len(blocks) + 1) // 2
    over = max(row.parameters / _row(rows, UNIFORM).parameters - 1 for rows in blocks.values() for row in rows)
    checks = {"parameters over the budget, %, worst row": check(100 * over, f"<= {100 * TOLERANCE:g}")}
    for measure in ("loss", "average"):
        verdicts = [d["verdict"] for d in against if d["measure"] == measure]
        name = "loss" if measure == "loss" else "average accuracy"
        checks[f"{name} better than uniform's, blocks of {n}"] = check(verdicts.count("win"), f">= {most}")
        checks[f"{name} worse than uniform's, blocks of {n}"] = check(verdicts.count("loss"), "<= 0")
    return checks


def report(blocks: Blocks, size: Size, *, part: bool) -> None:
    """Prints the tables and writes the results."""
    lines, differences = table_rows(blocks), paired(blocks)
    show(lines)
    print()
    show(
        [
            {k: f"{v:+.4f}" if k == "difference" else f"{v:.4f}" if isinstance(v, float) else v for k, v in d.items()}
            for d in differences
        ]
    )
    print()
    totals = counted(differences)
    show(totals)
    print()
    for block, rows in blocks.items():
        budget = _row(rows, UNIFORM).parameters
        error = 100 * item_error(rows, size.items or 250)
        print(f"{block}: budget {budget:,} parameters; an average has a standard error of {error:.1f} points by items")
    measured = [
        {"block": block, **vars(row), "budget": _row(rows, UNIFORM).parameters}
        for block, rows in blocks.items()
        for row in rows
    ]
    seeds = {"search": 0, "fresh": [1000 + i for i in range(size.seeds)]}
    more = {"size": asdict(size), "measured": measured, "paired": differences, "counted": totals}
    write("paper_table", lines, checks_of(blocks, differences), seeds=seeds, part=part, **more)


def main() -> None:
    """Runs the blocks, prints tables and writes results/paper_table.json."""
    import torch

    parser = command_parser(__doc__, "one block and tiny sizes")
    parser.add_argument("--size", choices=("cpu", "gpu"), help="default: gpu where there is one")
    parser.add_argument(
        "--blocks", nargs="*", choices=BLOCKS, metavar="NAME", help=f"of {', '.join(BLOCKS)}; none: only report"
    )
    parser.add_argument("--folder", type=Path, default=cache_dir() / "paper_table", help="models and trials")
    args = parser.parse_args()
    quiet()
    preset = "quick" if args.quick else args.size or ("gpu" if torch.cuda.is_available() else "cpu")
    size = SIZES[preset]
    blocks = args.blocks if args.blocks is not None else list(BLOCKS)[: 1 if args.quick else None]
    print(f"{preset}: {size}\nAbout {size.hours:.1f} hours a block on two CPU cores; {len(blocks)} to do.", flush=True)
    results, found = FOLDER / f"paper_table{'_part' if args.quick else ''}.json", {}
    for block in BLOCKS:
        if block in blocks:
            found[block] = run_block(block, recipe_of(block, size), size, args.folder / preset)
        elif known := finished_block(block, size, results):
            found[block] = known
    if not found:
        parser.error(f"{results.name} holds no block of this size; name blocks to run.")
    report(found, size, part=args.quick)
