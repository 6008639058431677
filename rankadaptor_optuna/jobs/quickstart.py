"""Quickstart: search, compare with uniform ranks, and write the adapter; resumable at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from rankadaptor_optuna.database import masked
from rankadaptor_optuna.jobs.compare import compare
from rankadaptor_optuna.jobs.export import train_adapter
from rankadaptor_optuna.jobs.output import OutputFolder
from rankadaptor_optuna.jobs.recipe import Recipe, in_current_format
from rankadaptor_optuna.jobs.results import DENSE, NONE, OURS, UNIFORM, Exported, QuickstartResult, Row, SearchResult
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.jobs.stored import load_pruned_job
from rankadaptor_optuna.priors.choice import OnBadPrior
from rankadaptor_optuna.space import Granularity, RankSpace
from rankadaptor_optuna.studies.recommendation import Recommendation

N_REPORT_SEEDS = 3


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

    In `out`: the files of `search` (`pruned/`, `study.db`, `settings.json`, `recommendation.json`), `compare/` (the
    files of `compare`) and `adapter/` (PEFT, on `pruned/`).

    Args:
        recipe: The definition of a trial; `PRESETS["quickstart"]` is made for it.
        out: Folder for all files.
        trials: Number of finished trials to reach.
        storage: Optuna storage URL. Default: SQLite in `out`.
        study_name: Name of the study.
        prior: See `RankAdaptorSampler`.
        on_bad_prior: See `RankAdaptorSampler`.
        say: Receives one line for each step.

    Raises:
        ValueError: The settings do not fit the model, or `out` or the study belongs to other settings.
    """
    start = time.perf_counter()
    options: dict[str, Any] = {"storage": storage, "study_name": study_name, "prior": prior}
    searched = search(recipe, out, trials=trials, on_bad_prior=on_bad_prior, say=say, **options)
    pruned, methods = out / "pruned", (DENSE, NONE, UNIFORM, OURS)
    comparison = compare(searched.storage, study_name, out / "compare", pruned=pruned, methods=methods, say=say)
    return QuickstartResult(searched, comparison, _exported(searched), time.perf_counter() - start)


def _exported(searched: SearchResult) -> Exported:
    """Trains and writes the adapter, unless `out/adapter` has the recommended ranks already."""
    recipe, ranks, out = searched.recipe, searched.recommendation.ranks, searched.out
    folder = OutputFolder(out, recipe.to_dict(), in_current_format)
    done = folder.measured.get("adapter")  # earlier versions kept a text there
    if not isinstance(done, dict) or done["ranks"] != ranks.to_json() or not (out / "adapter").exists():
        job = load_pruned_job(recipe, out / "pruned", ranks, searched.study_name)
        loss, before = train_adapter(job, ranks, out / "adapter", base=out / "pruned")
        done = {"ranks": ranks.to_json(), "loss": loss, "loss_before": before}
        folder.record("adapter", done)
    storage = masked(searched.storage)
    losses = done["loss"], done["loss_before"]
    return Exported(searched.recommendation, recipe, searched.study_name, storage, *losses, out)


@dataclass(frozen=True)
class Quickstart:
    """Options of the command, until it makes a recipe of them itself."""

    out: Path
    trials: int = 10
    seed: int = 0
    model: str | None = None
    ratio: float = 0.25
    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str = "uniform:8"
    granularity: Granularity = "layer"
    steps: int = 8
    storage: str | None = None
    study_name: str = "quickstart"

    def recipe(self) -> dict[str, Any]:
        """The settings."""
        return self._recipe().to_dict()

    def _recipe(self) -> Recipe:
        return Recipe.from_dict(
            {
                "preset": "quickstart",
                "model": self.model or "embedded",
                "seed": self.seed,
                "pruning": {"ratio": self.ratio},
                "space": {
                    "candidates": list(self.candidates),
                    "budget": self.budget,
                    "granularity": self.granularity,
                },
                "training": {"steps": self.steps},
            }
        )


def storage_url(config: Quickstart) -> str:
    """Where the study lives."""
    return config.storage or f"sqlite:///{(config.out / 'study.db').as_posix()}"


@dataclass
class Outcome:
    """What a quickstart found.

    Attributes:
        study: The study.
        recommendation: The recommended configuration.
        space: The rank space.
        dense: Loss and accuracy of the dense model.
        pruned: The same of the pruned one.
        uniform: Of the uniform recovery: ``losses`` by fresh seed, ``accuracy`` on the first of them.
        recommended: The same of the recommended one.
        seconds: Wall time of this run.
        recipe: The settings.
    """

    study: Study
    recommendation: Recommendation
    space: RankSpace
    dense: dict[str, Any]
    pruned: dict[str, Any]
    uniform: dict[str, Any]
    recommended: dict[str, Any]
    seconds: float
    recipe: dict[str, Any]


def run(config: Quickstart, say: Callable[[str], None] = print) -> Outcome:
    """The quickstart, as the present view wants it."""
    import optuna

    from rankadaptor_optuna.recovery.models import quiet
    from rankadaptor_optuna.views.report import write_report

    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    recipe = config._recipe()
    names = {"storage": config.storage, "study_name": config.study_name}
    found = quickstart(recipe, config.out, trials=config.trials, say=say, **names)  # type: ignore[arg-type]

    def measured(row: Row) -> dict[str, Any]:
        accuracy = row.accuracies["continuation"][0]
        return {
            "loss": row.losses[0],
            "losses": row.losses,
            "accuracy": [accuracy, (accuracy * (1 - accuracy) / 60) ** 0.5],
            "parameters": row.parameters or row.total_parameters,
        }

    dense, pruned, uniform, ours = [measured(found.comparison.row(method)) for method in (DENSE, NONE, UNIFORM, OURS)]
    searched = found.search
    outcome = Outcome(
        searched.study,
        searched.recommendation,
        searched.space,
        dense,
        pruned,
        uniform,
        ours,
        found.seconds,
        recipe.to_dict(),
    )
    write_report(outcome, config.out)
    return outcome
