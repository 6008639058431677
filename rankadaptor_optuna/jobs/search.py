"""Search: prunes the model of a recipe, runs trials as one worker, and recommends ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.attributes import DIGESTS_ATTR, TRIALS_ATTR, digests_of, trials_of
from rankadaptor_optuna.database.connections import masked
from rankadaptor_optuna.jobs.inputs import Inputs
from rankadaptor_optuna.jobs.output import only_process, write_json
from rankadaptor_optuna.jobs.priors import read_prior
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import SearchResult
from rankadaptor_optuna.jobs.settings import CONTINUATION
from rankadaptor_optuna.jobs.stored import check_digests, recipe_as_stored, recipe_folder
from rankadaptor_optuna.jobs.worker import run_trials
from rankadaptor_optuna.priors.choice import OnBadPrior
from rankadaptor_optuna.recovery.processes import join_processes, main_first, process_index
from rankadaptor_optuna.recovery.tasks import check_names
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.studies.recommendation import recommend
from rankadaptor_optuna.studies.storage import check_study_name, create_study, open_storage

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.core import PrunedModel

DEFAULT_TRIALS = 25


def pruner_of(recipe: Recipe, steps: int) -> BasePruner:
    """Returns Optuna's pruner for the reports of a recipe's trials; ``steps`` is the length of a recovery."""
    if recipe.report_items:
        return WilcoxonPruner()
    if recipe.report_every is None:
        return NopPruner()
    if recipe.pruner == "hyperband":
        return HyperbandPruner(min_resource=recipe.report_every, max_resource=max(steps, recipe.report_every))
    return MedianPruner()


def search(
    recipe: Recipe,
    out: Path,
    *,
    trials: int | None = None,
    storage: str | None = None,
    study_name: str = "search",
    prior: str | None = "pretrained",
    on_bad_prior: OnBadPrior = "raise",
    check: Callable[[Inputs], Any] | None = None,
    say: Callable[[str], None] = print,
) -> SearchResult:
    """Prunes the model if it is dense, searches ranks up to a number of trials, and recommends.

    Run again with the same settings, it continues; any number of workers may share ``storage`` and ``study_name``. One
    worker may be several processes with a GPU each (``accelerate launch -m rankadaptor_optuna.cli search ...``), which
    share the batches of every recovery; only the main process asks, tells, evaluates, prints and writes.

    Args:
        recipe: The definition of a trial.
        out: Folder of the pruned model, the recommendation (``recommendation.json``) and, by default, the study.
        trials: Number of finished trials to reach. Default: the number that a worker has set for the study, else 25.
        storage: Optuna storage URL. Default: SQLite in ``out``.
        study_name: Name of the study.
        prior: See ``RankAdaptorSampler``; a prior of a database must be in ``storage``.
        on_bad_prior: See ``RankAdaptorSampler``.
        check: Called before any pruning; it may refuse data that a later job needs.
        say: Receives one line for each step.

    Raises:
        ValueError: A setting does not fit the model or the data, the prior cannot be read, or ``out`` or the study
            belongs to other settings.
    """
    from rankadaptor_optuna.pruning.checkpoint import remove_unfinished, save_pruned

    if trials is not None and trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    check_study_name(study_name)
    join_processes()
    url = storage or f"sqlite:///{(out / 'study.db').as_posix()}"
    settings = recipe.resolved().to_dict()
    with main_first(), only_process(out, say):
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
        if check is not None:
            check(inputs)
        digests, suite = inputs.digests(), recipe.evaluation.suite(inputs.tokenizer, "search")
        check_names(set(recipe.evaluation.report_tasks) - {CONTINUATION}, recipe.evaluation.include_path)
        if opened is not None and study_name in optuna.get_all_study_names(opened):
            check_digests(optuna.load_study(study_name=study_name, storage=opened), digests)

        def keep(model: Any, tokenizer: Any, pruned: PrunedModel | None) -> None:  # noqa: ANN401
            if pruned is not None:
                removed = f"{pruned.parameters_removed:.1%} of the blocks' parameters removed"
                say(f"Pruned by {recipe.pruning.method}: {removed}")
            folder.start()
            remove_unfinished(out / "pruned")
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
        check_digests(study, digests)  # again: a worker with other data may have begun at the same moment
    if process_index() != 0:
        job.follow()
        return SearchResult(study, study_name, url, recipe, job.space, recommend(study), inputs.pruned, out)
    target = trials or trials_of(study.user_attrs) or DEFAULT_TRIALS
    study.set_user_attr(TRIALS_ATTR, target)
    say(f"Study {study_name!r} in {masked(url)}: {target} trials, {job.space!r}")
    try:
        run_trials(study, job, target, shared=True, say=say)
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
