"""A worker: trials of a recipe up to a number, alone or with others on one database, and what they recommend."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.attributes import RECIPE_ATTR
from rankadaptor_optuna.jobs.output import bar, check_output_folder, write_text
from rankadaptor_optuna.jobs.priors import read_prior
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import SearchResult
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.priors.choice import OnBadPrior
from rankadaptor_optuna.recovery.processes import join_processes, main_first, process_index
from rankadaptor_optuna.sampling.history import verification_seed
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.studies.recommendation import recommend
from rankadaptor_optuna.studies.storage import check_recipe, create_study, masked, open_storage


def open_shared(url: str | None, study_name: str, recipe: dict[str, Any]) -> BaseStorage | None:
    """Opens the shared storage, where one is given, before any work is done.

    Raises:
        ValueError: It cannot be opened, or its study of that name belongs to other settings.
    """
    if url is None:
        return None
    storage = open_storage(url)
    if study_name in optuna.get_all_study_names(storage):
        check_recipe(optuna.load_study(study_name=study_name, storage=storage), recipe)
    return storage


def pruner_of(recipe: Recipe, steps: int) -> BasePruner:
    """The pruner that goes with what the recipe's trials report; ``steps`` is how many a recovery takes."""
    if recipe.report_items:
        return WilcoxonPruner()
    if recipe.report_every is None:
        return NopPruner()
    if recipe.pruner == "hyperband":
        return HyperbandPruner(min_resource=recipe.report_every, max_resource=max(steps, recipe.report_every))
    return MedianPruner()


def run_trials(study: Study, job: RecoveryObjective, n_trials: int, *, shared: bool) -> None:
    """Runs trials up to a number of finished ones, which all workers on a shared storage reach together.

    Args:
        study: The study.
        job: Its objective; a progress bar follows its steps.
        n_trials: Finished or pruned trials to reach, those that verify not counted.
        shared: Whether other workers may be at it: what they have running counts, and is waited for at the end.

    Raises:
        ValueError: No trial finished; the message says why the last one failed.
    """
    steps = job.training.steps

    def trials(*states: TrialState) -> list[FrozenTrial]:
        return [t for t in study.get_trials(deepcopy=False, states=states) if verification_seed(t) is None]

    def n_done() -> int:
        return len(trials(TrialState.COMPLETE, TrialState.PRUNED))

    missing = n_trials - n_done()
    if missing <= 0:
        return
    with bar("search", missing * steps) as shown:

        def describe(doing: str = "search") -> None:
            done = trials(TrialState.COMPLETE)
            better = min if job.direction == "minimize" else max
            best = f", best {better(t.value for t in done if t.value is not None):.4f}" if done else ""
            shown.total = shown.n + max(0, n_trials - n_done()) * steps  # others take some of them
            shown.set_description(f"      {doing}, {n_done()} of {n_trials} trials{best}")

        def await_others() -> None:
            """Until what now runs elsewhere has ended, so that all workers recommend from the same trials."""
            if not shared:
                return
            theirs = {trial.number for trial in trials(TrialState.RUNNING)}
            longest = max((t.duration.total_seconds() for t in trials(TrialState.COMPLETE) if t.duration), default=60)
            end = time.monotonic() + max(600, 10 * longest)  # one killed before its first heartbeat runs for ever
            while theirs & {trial.number for trial in trials(TrialState.RUNNING)} and time.monotonic() < end:
                describe("waiting for other workers")
                time.sleep(1)
                optuna.storages.fail_stale_trials(study)

        job.on_step = lambda step, loss: shown.update(1)
        for _ in range(missing):  # at most so many of our own, also where they fail
            describe()
            running = trials(TrialState.RUNNING) if shared else []
            if n_done() + len(running) >= n_trials:
                await_others()
            if n_done() >= n_trials:
                break
            study.optimize(job, n_trials=1)
        await_others()
        job.on_step = None
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        reason = study.trials[-1].user_attrs.get("fail_reason", "no reason recorded")
        raise ValueError(f"no trial finished; the last one failed with {reason}")


def stored_recipe(url: str, study_name: str) -> Recipe:
    """The recipe that a study was made with: all that another worker needs.

    Raises:
        ValueError: There is no such study, or it was made without a recipe.
    """
    storage = open_storage(url)
    if study_name not in optuna.get_all_study_names(storage):
        raise ValueError(f"{masked(url)} has no study named {study_name!r}; name one, or give a recipe to start it.")
    stored = optuna.load_study(study_name=study_name, storage=storage).user_attrs.get(RECIPE_ATTR)
    if stored is None:
        raise ValueError(f"study {study_name!r} was made without a recipe; give one.")
    return Recipe.from_dict(stored)


def search(
    recipe: Recipe,
    out: Path,
    *,
    trials: int,
    storage: str | None = None,
    study_name: str = "search",
    prior: str | None = "pretrained",
    on_bad_prior: OnBadPrior = "raise",
    say: Callable[[str], None] = print,
) -> SearchResult:
    """Prunes the model if it is dense, searches ranks up to a number of trials, and recommends.

    Run again with the same settings it goes on; any number of workers may share ``storage`` and ``study_name``. One
    worker may be several processes with a GPU each (``accelerate launch -m rankadaptor_optuna.cli search ...``), which
    share the batches of every recovery; the main one alone asks, tells, evaluates, says and writes.

    Args:
        recipe: What a trial is.
        out: Folder of the pruned model, the recommendation (``recommendation.json``) and, by default, the study.
        trials: Finished trials to reach.
        storage: Optuna storage URL. Default: SQLite in ``out``.
        study_name: Name of the study.
        prior: See ``RankAdaptorSampler``; one of a database must be in ``storage``.
        on_bad_prior: See ``RankAdaptorSampler``.
        say: Receives one line for each step.

    Raises:
        ValueError: A setting does not fit the model or the data, the prior cannot be had, or ``out`` or the study
            belongs to other settings.
    """
    from rankadaptor_optuna.pruning.checkpoint import save_pruned

    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    join_processes()
    settings = recipe.to_dict()
    with main_first():
        check_output_folder(out, settings)
        shared = open_shared(storage, study_name, settings)
        if prior is not None and on_bad_prior == "raise":
            read_prior(prior, storage)  # before there is any work to lose
        folder, pruned = out / "pruned", None
        if folder.exists():
            model, tokenizer = recipe.open_model(folder)
            job = recipe.objective(model, tokenizer)
        else:
            say(f"Model: {recipe.model}")
            model, tokenizer, pruned = recipe.read_model()
            if pruned is not None:
                removed = f"{pruned.parameters_removed:.1%} of the blocks' parameters removed"
                say(f"Pruned by {recipe.pruning.method}: {removed}")
            job = recipe.objective(model, tokenizer)
            out.mkdir(parents=True, exist_ok=True)  # every setting has proved possible
            write_text(out / "settings.json", json.dumps(settings, indent=1))
            save_pruned(model, folder, tokenizer)
    url = storage or f"sqlite:///{(out / 'study.db').as_posix()}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # Wilcoxon's is one
        pruner = pruner_of(recipe, job.training.steps)
    study = create_study(
        storage=shared or url,
        study_name=study_name,
        sampler=RankAdaptorSampler(job.space, prior=prior, seed=recipe.seed, on_bad_prior=on_bad_prior),
        direction=job.direction,
        recipe=settings,
        pruner=pruner,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([job.metric])
    if process_index() != 0:
        job.follow()
        return SearchResult(study, study_name, url, recipe, job.space, recommend(study), pruned, out)
    say(f"Study {study_name!r} in {masked(url)}: {trials} trials, {job.space!r}")
    try:
        run_trials(study, job, trials, shared=storage is not None)
    finally:
        job.release()
    found = recommend(study)
    answer = {
        "ranks": found.ranks.to_json(),
        "rank_pattern": found.rank_pattern,
        "alpha_pattern": found.alpha_pattern,
        "trainable_parameters": found.cost,
        "evidence": found.evidence.statement,
    }
    write_text(out / "recommendation.json", json.dumps(answer, indent=1))
    say(found.evidence.statement)
    return SearchResult(study, study_name, url, recipe, job.space, found, pruned, out)
