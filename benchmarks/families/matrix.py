"""Prune, save, recover, export and reload tiny models of many families, and write docs/families.md.

    python -m benchmarks.families [FAMILY ...] [--quick]

Each family runs in a process of its own with a time limit. A cell is "right", the one-line error by which the package
refuses, or WRONG. Right means: a pruned model computes the same logits after saving and loading; a recovery trains
exactly the parameters that the rank space counts; the exported adapter has the same logits on the saved base by plain
PEFT, and so have as many parameters the pasted arguments of its LoraConfig.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.families.models import FAMILIES, ByteLevelTokenizer, tiny_model
from benchmarks.report import check, command_parser, selected, set_up, show, write
from rankadaptor_optuna import RankSpace, RecoveryObjective
from rankadaptor_optuna.jobs.export import train_adapter
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.recovery.lora import trainable_parameters
from rankadaptor_optuna.recovery.models import quiet
from rankadaptor_optuna.recovery.train import TrainingConfig

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
RIGHT, WRONG = "right", "WRONG: "
LIMIT = 60.0  # seconds per family
QUICK = ("llama", "gpt2", "qwen3_moe", "llava")
PRUNINGS: dict[str, dict[str, Any]] = {
    "whole blocks": {"method": "shortened"},
    "heads and channels": {"method": "llm-pruner", "multiple_of": 8},
    "SlimGPT": {"method": "slimgpt", "multiple_of": 8},
    "hidden channels": {"method": "llm-pruner", "structure": "hidden", "multiple_of": 8},
}
COLUMNS = (*PRUNINGS, "recovery", "export and reload")
_SETTINGS: dict[str, Any] = {"ratio": 0.25, "n_samples": 4, "sample_length": 24, "keep_first": 0, "keep_last": 0}
_TEXTS = ["a layer of a model has a rank, and its adapter has two factors: " * 12]
_OTHER_NAMES, _OTHER_TYPE = "looked for model.layers", "known types:"  # in refusals by methods for LLaMA-like models


def cell(run: Callable[[], None]) -> str:
    """Returns the outcome of a step: right, the package's refusal, or what went wrong."""
    try:
        run()
    except ValueError as error:  # how the package refuses
        text = str(error)
        return text if "\n" not in text.strip() else f"{WRONG}error of several lines: {text.splitlines()[0]}"
    except Exception as error:  # a fault of the package; the table names it
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{WRONG}{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {str(error)[:150]}"
    return RIGHT


def examine(family: str) -> dict[str, str]:
    """Returns the outcome of each column for a family."""
    with tempfile.TemporaryDirectory() as scratch:
        return _Examined(family, Path(scratch)).cells()


class _Examined:
    """A family's steps; the model recovered is the one without some blocks, else the dense one."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model, self.folder, self.tokenizer = tiny_model(family), folder, ByteLevelTokenizer()
        self.ids = torch.randint(1, 200, (2, 24), generator=torch.Generator().manual_seed(1))
        self.base, self.name = self.model, "dense"
        self.pruned: dict[str, Any] = {}
        self.job: RecoveryObjective | None = None
        self.found: dict[str, str] = {}

    def cells(self) -> dict[str, str]:
        self.found = {name: cell(partial(self._prune, name)) for name in PRUNINGS}
        self.found["recovery"] = cell(self._recover)
        self.found["export and reload"] = cell(self._export) if self.job is not None else ""
        return self.found

    def _loaded(self, name: str) -> Any:  # noqa: ANN401
        kind: Any = type(self.base if name == "dense" else self.pruned[name])
        return kind.from_pretrained(self.folder / name)

    def _prune(self, name: str) -> None:
        result = prune(self.model, self.tokenizer, calibration=_TEXTS, **_SETTINGS, **PRUNINGS[name])
        result.save(self.folder / name)
        self.pruned[name] = result.model
        with torch.no_grad():
            same = torch.equal(self._loaded(name)(self.ids).logits, result.model(self.ids).logits)
        assert same, "other logits after saving and loading"
        assert 0 < result.parameters_removed < 1, result.parameters_removed
        if name == "whole blocks":
            self.base, self.name = result.model, name

    def _recover(self) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            space = RankSpace.from_model(self.base, (0, 2, 4), "uniform:4", unpruned_rank=None)
            training = TrainingConfig(steps=2, batch_size=2)
            texts: dict[str, Any] = {"train": _TEXTS, "validation": _TEXTS, "block_length": 24}
            job = RecoveryObjective(self.base, self.tokenizer, space, training=training, **texts)
        notes = [str(w.message).partition("no adapters in: ")[2] for w in said if "no adapters in" in str(w.message)]
        self.found["without adapters"] = notes[0].rstrip(".") if notes else ""
        before = self.base(self.ids).logits
        with job.recovered(space.uniform()) as adapted:
            assert trainable_parameters(adapted) == space.cost(space.uniform()), "other parameters than counted"
            idle = [name for name, p in adapted.named_parameters() if "lora_B" in name and not (p != 0).any()]
            assert not idle, f"{len(idle)} adapters did not move, such as {idle[0]}"
        assert torch.equal(self.base(self.ids).logits, before), "the model was changed"
        self.job = job

    def _export(self) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        assert self.job is not None
        job, space = self.job, self.job.space
        if self.name == "dense":
            self.base.save_pretrained(self.folder / "dense")
        ranks = space.to_ranks({name: (4, 0, 2)[i % 3] for i, name in enumerate(space.names)})
        train_adapter(job, ranks, self.folder / "adapter", base=str(self.folder / self.name))
        with job.recovered(ranks) as adapted, torch.no_grad():
            expected = adapted.eval()(input_ids=self.ids).logits
        reloaded = PeftModel.from_pretrained(self._loaded(self.name), self.folder / "adapter").eval()
        with torch.no_grad():
            assert torch.equal(reloaded(input_ids=self.ids).logits, expected), "other logits after reloading by PEFT"
        arguments = space.with_fixed(ranks).lora_arguments(job.lora)
        pasted = get_peft_model(self._loaded(self.name), LoraConfig(**arguments))
        assert trainable_parameters(pasted) == space.cost(ranks), "LoraConfig's arguments give other parameters"


def _work(family: str, out: Any) -> None:  # noqa: ANN401
    warnings.simplefilter("ignore")
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # progress bars
            out.send((examine(family), time.process_time()))
    except Exception as error:  # the model could not even be made
        out.send((dict.fromkeys(COLUMNS, f"{WRONG}{type(error).__name__}: {str(error)[:150]}"), time.process_time()))


def run(family: str) -> tuple[dict[str, str], float]:
    """Examines a family in a process of its own; returns its cells and its CPU seconds."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(family, send))
    process.start()
    send.close()
    try:
        if receive.poll(LIMIT):
            return receive.recv()
        reason = f"{WRONG}no end after {LIMIT:.0f} seconds"
    except EOFError:
        reason = f"{WRONG}the process died"
    finally:
        process.kill()
        process.join()
    return dict.fromkeys(COLUMNS, reason), LIMIT


def table(rows: Sequence[Mapping[str, str]], versions: Mapping[str, str]) -> str:
    """Returns the table as Markdown; refusals are numbered and listed below it."""
    refusals: dict[str, int] = {}

    def shown(text: str) -> str:
        if text in (RIGHT, "") or text.startswith(WRONG):
            return text or "-"
        if _OTHER_NAMES in text or _OTHER_TYPE in text:
            return "-"
        return f"refused ({refusals.setdefault(text, len(refusals) + 1)})"

    lines = [f"| family | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    lines += [f"| `{row['family']}` | {' | '.join(shown(row[column]) for column in COLUMNS)} |" for row in rows]
    listed = [f"{number}. {text}" for text, number in refusals.items()]
    notes = [f"| `{row['family']}` | {row['without adapters']} |" for row in rows if row.get("without adapters")]
    return "\n".join(
        [
            "# Model families",
            "",
            "Written by `python -m benchmarks.families`. Tiny random models of "
            f"{len(rows)} families (transformers {versions['transformers']}, PEFT {versions['peft']})",
            "are pruned, saved, loaded, recovered for 2 steps, exported, and reloaded by plain PEFT.",
            "",
            "* right: the pruned model has the same logits after saving and loading; the recovery trains exactly the",
            "  parameters that the rank space counts; the exported adapter has the same logits on the saved base.",
            "* refused: by the error with this number. None of it depends on the size of a model.",
            "* -: the method knows Llama, Mistral, Qwen2 and Qwen3 models only, and says so.",
            "",
            *lines,
            "",
            "## Refusals",
            "",
            *listed,
            "",
            "## Modules without adapters",
            "",
            "A warning names them when a rank space is made.",
            "",
            "| family | no adapters in |",
            "| --- | --- |",
            *notes,
            "",
        ]
    )


def main() -> None:
    """Examines the families, prints a table, and writes results/families.json and docs/families.md."""
    parser = command_parser(__doc__, f"{', '.join(QUICK)} only")
    parser.add_argument("family", nargs="*", help="families to examine; all by default")
    args = parser.parse_args()
    part = args.quick or bool(args.family)
    families = selected(parser, "family", args.family, FAMILIES) or list(QUICK if args.quick else FAMILIES)
    set_up()
    quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a warning after each fork
    rows, seconds = [], time.process_time()
    for family in families:
        cells, spent = run(family)
        seconds += spent
        rows.append({"family": family, **cells})
    show([{"family": row["family"], **{c: row[c][:40] for c in COLUMNS}} for row in rows])
    outcomes = [row[column] for row in rows for column in COLUMNS]
    checks = {
        "cells that are wrong": check(sum(text.startswith(WRONG) for text in outcomes), "<= 0"),
        "CPU minutes": check(seconds / 60, "<= 10"),
        "families": check(len(rows), ">= 30"),
    }
    versions = {package: version(package) for package in ("transformers", "peft")}
    write("families", rows, checks, seeds=[0, 1], part=part, versions=versions)
    if not part:
        TABLE.write_text(table(rows, versions))
