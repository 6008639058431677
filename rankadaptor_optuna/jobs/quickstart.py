"""Quickstart: search, compare with uniform ranks, and write the adapter; resumable at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankadaptor_optuna.database.connections import masked
from rankadaptor_optuna.jobs.compare import compare
from rankadaptor_optuna.jobs.export import train_adapter
from rankadaptor_optuna.jobs.inputs import Inputs
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import DENSE, NONE, OURS, UNIFORM, Exported, QuickstartResult, SearchResult
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.jobs.stored import load_pruned_job, recipe_folder
from rankadaptor_optuna.priors.choice import OnBadPrior
from rankadaptor_optuna.recovery.evaluate import block_losses


def quickstart(
    recipe: Recipe,
    out: Path,
    *,
    trials: int = 10,
    storage: str | None = None,
    study_name: str = "quickstart",
    prior: str | None = "pretrained",
    on_bad_prior: OnBadPrior = "raise",
    say: Callable[[str], None] = print,
) -> QuickstartResult:
    """Prunes, searches, compares with uniform ranks and writes the adapter; run again, it continues.

    In ``out``: the files of ``search`` (``pruned/``, ``study.db``, ``settings.json``, ``recommendation.json``),
    ``compare/`` (the files of ``compare``) and ``adapter/`` (PEFT, on ``pruned/``).

    Args:
        recipe: The definition of a trial; ``PRESETS["quickstart"]`` is made for it.
        out: Folder for all files.
        trials: Number of finished trials to reach.
        storage: Optuna storage URL. Default: SQLite in ``out``.
        study_name: Name of the study.
        prior: See ``RankAdaptorSampler``.
        on_bad_prior: See ``RankAdaptorSampler``.
        say: Receives one line for each step.

    Raises:
        ValueError: The settings do not fit the model, or ``out`` or the study belongs to other settings.
    """
    start = time.perf_counter()
    options: dict[str, Any] = {"storage": storage, "study_name": study_name, "prior": prior}

    def check_report(inputs: Inputs) -> None:
        report = inputs.parts.report
        inputs.examples(report, recipe.data.report_blocks)
        recipe.evaluation.for_report().suite(inputs.tokenizer, "report", report)

    searched = search(recipe, out, trials=trials, on_bad_prior=on_bad_prior, check=check_report, say=say, **options)
    pruned, methods = out / "pruned", (DENSE, NONE, UNIFORM, OURS)
    # the study's recipe is the given one
    settings: dict[str, Any] = {"pruned": pruned, "methods": methods, "trust_study": True, "say": say}
    comparison = compare(searched.storage, study_name, out / "compare", **settings)
    return QuickstartResult(searched, comparison, _exported(searched, say), time.perf_counter() - start)


def _exported(searched: SearchResult, say: Callable[[str], None]) -> Exported:
    """Trains and writes the adapter, unless ``out/adapter`` has the recommended ranks already, or all ranks are 0."""
    recipe, ranks, out = searched.recipe, searched.recommendation.ranks, searched.out
    folder, base = recipe_folder(out, recipe), str((out / "pruned").resolve())
    done = folder.measured.get("adapter")  # earlier versions kept a text there
    if not isinstance(done, dict) or done["ranks"] != ranks.to_json() or not (out / "adapter").exists():
        say("Adapter: training with the recommended ranks")
        job = load_pruned_job(recipe, out / "pruned", ranks, searched.study)
        if any(searched.recommendation.all_ranks.values()):
            loss, before = train_adapter(job, ranks, out / "adapter", base=base)
        else:
            loss = before = float(block_losses(job.model, job.held_out).mean())
        done = {"ranks": ranks.to_json(), "loss": loss, "loss_before": before}
        folder.record("adapter", done)
    storage = masked(searched.storage)
    losses = done["loss"], done["loss_before"]
    return Exported(searched.recommendation, recipe, searched.study_name, storage, *losses, base, out)
