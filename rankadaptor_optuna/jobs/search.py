"""Search: a worker that runs trials of a recipe, alone or with others on one database, and recommends ranks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.attributes import DIGESTS_ATTR, digests_of
from rankadaptor_optuna.database import masked
from rankadaptor_optuna.jobs.inputs import Inputs
from rankadaptor_optuna.jobs.output import bar, write_json
from rankadaptor_optuna.jobs.priors import read_prior
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import SearchResult
from rankadaptor_optuna.jobs.stored import check_digests, recipe_as_stored, recipe_folder
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.plain_text import one_line
from rankadaptor_optuna.priors.choice import OnBadPrior
from rankadaptor_optuna.recovery.processes import join_processes, main_first, process_index
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.studies.recommendation import recommend
from rankadaptor_optuna.studies.storage import create_study, open_storage

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.core import PrunedModel


def pruner_of(recipe: Recipe, steps: int) -> BasePruner:
    """Returns Optuna's pruner for the reports of a recipe's trials; ``steps`` is the length of a recovery."""
    if recipe.report_items:
        return WilcoxonPruner()
    if recipe.report_every is None:
        return NopPruner()
    if recipe.pruner == "hyperband":
        return HyperbandPruner(min_resource=recipe.report_every, max_resource=max(steps, recipe.report_every))
    return MedianPruner()


def run_trials(study: Study, job: RecoveryObjective, n_trials: int, *, shared: bool) -> None:
    """Runs trials up to a number of finished trials, which all workers on a shared storage reach together.

    Args:
        study: The study.
        job: Its objective; a progress bar follows its steps.
        n_trials: Number of finished or pruned trials to reach, verification trials not counted.
        shared: Whether other workers may run trials: these count while they run, and the end waits for them.

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
            shown.total = shown.n + max(0, n_trials - n_done()) * steps  # other workers run some of the trials
            shown.set_description(f"      {doing}, {n_done()} of {n_trials} trials{best}")

        def await_others() -> None:
            """Waits for the trials that run elsewhere, so that all workers recommend from the same trials."""
            if not shared:
                return
            theirs = {trial.number for trial in trials(TrialState.RUNNING)}
            longest = max((t.duration.total_seconds() for t in trials(TrialState.COMPLETE) if t.duration), default=60)
            # a trial killed before its first heartbeat stays RUNNING; both limits are set by hand
            end = time.monotonic() + max(600, 10 * longest)
            while theirs & {trial.number for trial in trials(TrialState.RUNNING)} and time.monotonic() < end:
                describe("waiting for other workers")
                time.sleep(1)
                optuna.storages.fail_stale_trials(study)

        job.on_step = lambda step, loss: shown.update(1)
        for _ in range(missing):  # failed trials of this worker count here: no endless loop
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
        reason = one_line(study.trials[-1].user_attrs.get("fail_reason", "no reason recorded"))
        raise ValueError(f"no trial finished; the last one failed with {reason}")


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

    Run again with the same settings, it continues; any number of workers may share ``storage`` and ``study_name``. One
    worker may be several processes with a GPU each (``accelerate launch -m rankadaptor_optuna.cli search ...``), which
    share the batches of every recovery; only the main process asks, tells, evaluates, prints and writes.

    Args:
        recipe: The definition of a trial.
        out: Folder of the pruned model, the recommendation (``recommendation.json``) and, by default, the study.
        trials: Number of finished trials to reach.
        storage: Optuna storage URL. Default: SQLite in ``out``.
        study_name: Name of the study.
        prior: See ``RankAdaptorSampler``; a prior of a database must be in ``storage``.
        on_bad_prior: See ``RankAdaptorSampler``.
        say: Receives one line for each step.

    Raises:
        ValueError: A setting does not fit the model or the data, the prior cannot be read, or ``out`` or the study
            belongs to other settings.
    """
    from rankadaptor_optuna.pruning.checkpoint import save_pruned

    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    join_processes()
    url = storage or f"sqlite:///{(out / 'study.db').as_posix()}"
    settings = recipe.resolved().to_dict()
    with main_first():
        folder = recipe_folder(out, recipe)
        opened = None if storage is None else open_storage(storage)
        if opened is not None:
            recipe_as_stored(opened, study_name, settings)  # refuses other settings before any work
        if prior is not None and on_bad_prior == "raise":
            read_prior(prior, storage)
        is_pruned = (out / "pruned").exists()
        if not is_pruned:
            say(f"Model: {one_line(recipe.model)}")
        inputs = Inputs(recipe, out / "pruned" if is_pruned else None)
        digests, suite = inputs.digests(), recipe.evaluation.suite(inputs.tokenizer, "search")
        if opened is not None and study_name in optuna.get_all_study_names(opened):
            check_digests(optuna.load_study(study_name=study_name, storage=opened), digests)

        def keep(model: Any, tokenizer: Any, pruned: PrunedModel | None) -> None:  # noqa: ANN401
            if pruned is not None:
                removed = f"{pruned.parameters_removed:.1%} of the blocks' parameters removed"
                say(f"Pruned by {recipe.pruning.method}: {removed}")
            folder.start()
            save_pruned(model, out / "pruned", tokenizer)

        job = inputs.objective(None if is_pruned else keep, tasks=suite, metric=recipe.evaluation.metric)
        opened = opened or open_storage(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of WilcoxonPruner and metric names
        study = create_study(
            storage=opened,
            study_name=study_name,
            sampler=RankAdaptorSampler(job.space, prior=prior, seed=recipe.seed, on_bad_prior=on_bad_prior),
            direction=job.direction,
            recipe=recipe_as_stored(opened, study_name, settings),
            pruner=pruner_of(recipe, job.training.steps),
        )
        study.set_metric_names([job.metric])
        check_digests(study, digests)
        study.set_user_attr(DIGESTS_ATTR, {**digests_of(study.user_attrs), **digests})
    if process_index() != 0:
        job.follow()
        return SearchResult(study, study_name, url, recipe, job.space, recommend(study), inputs.pruned, out)
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
        "lora_arguments": found.lora_arguments if any(found.all_ranks.values()) else None,
        "trainable_parameters": found.cost,
        "evidence": found.evidence.statement,
    }
    write_json(out / "recommendation.json", answer)
    say(found.evidence.statement)
    return SearchResult(study, study_name, url, recipe, job.space, found, inputs.pruned, out)
