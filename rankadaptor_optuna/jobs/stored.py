"""The study of an earlier search: its recipe, its pruned model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.attributes import RECIPE_ATTR, digests_of, recipe_of
from rankadaptor_optuna.database.connections import masked
from rankadaptor_optuna.jobs.inputs import Inputs, OnPruned
from rankadaptor_optuna.jobs.output import OutputFolder
from rankadaptor_optuna.jobs.recipe import Recipe, comparable
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.studies.storage import check_same_settings, open_storage

_MOST_NAMED = 10
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", re.ASCII)


def stored_study(url: str, study_name: str | None = None, trust_study: bool = False) -> tuple[Study, Recipe]:
    """Loads a study and the recipe that it was made with: all that another worker needs.

    Args:
        url: Optuna storage URL.
        study_name: Name of the study. Default: the only study with a recipe.
        trust_study: Whether the recipe may name files of this machine and folders of tasks, which may hold code.

    Raises:
        ValueError: There is no such database, study or recipe, several studies have a recipe and none is named, or
            the recipe names files without ``trust_study``.
    """
    storage = open_storage(url, create=False)
    if study_name is None:
        study_name = _only_study(storage, url)
    elif study_name not in optuna.get_all_study_names(storage):
        names = ", ".join(map(one_line, optuna.get_all_study_names(storage)[:_MOST_NAMED])) or "none"
        raise ValueError(f"{masked(url)} has no study named {study_name!r}; there is {names}.")
    study = optuna.load_study(study_name=study_name, storage=storage)
    try:
        stored = recipe_of(study.user_attrs)
        recipe = None if stored is None else Recipe.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"the recipe of study {study_name!r}: {one_line(error)}") from error
    if recipe is None:
        raise ValueError(f"study {study_name!r} was made without a recipe; give one.")
    if not trust_study and (named := named_files(recipe)):
        raise ValueError(
            f"the recipe of study {study_name!r} names local files, and those of tasks may run code: "
            f"{one_line(', '.join(named)):.200}. Give --trust-study (trust_study=True) if you trust all who can write "
            "to the database."
        )
    return study, recipe


def named_files(recipe: Recipe) -> list[str]:
    """Returns the settings of a recipe that name files or folders, not models and data sets of the Hub, with values."""
    sources = {"model": recipe.model, "pruning.calibration": recipe.pruning.calibration}
    sources |= {f"data.{part}": getattr(recipe.data, part) for part in ("train", "validation", "report")}
    named = [f"{key} {value}" for key, value in sources.items() if value is not None and not _is_of_hub(value)]
    path = recipe.evaluation.include_path
    return named if path is None else [*named, f"evaluation.include_path {path}"]


def _is_of_hub(name: str) -> bool:
    """Whether a name is one of the Hub, ``NAME``, ``OWNER/NAME`` or ``NAME:CONFIG``, and no file of this machine."""
    path, _, _ = name.partition(":")
    return _HUB_NAME.fullmatch(name) is not None and not os.path.exists(name) and not os.path.exists(path)


def stored_recipe(url: str, study_name: str | None = None, trust_study: bool = False) -> Recipe:
    """Returns the recipe of a study; see ``stored_study``."""
    return stored_study(url, study_name, trust_study)[1]


def _only_study(storage: BaseStorage, url: str) -> str:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    names = [summary.study_name for summary in summaries if RECIPE_ATTR in summary.user_attrs]
    if not names:
        raise ValueError(f"{masked(url)} has no study with a recipe; `search` with a recipe starts one.")
    if len(names) > 1:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise ValueError(
            f"{masked(url)} has several studies: {', '.join(map(one_line, names[:_MOST_NAMED]))}{more}; name one."
        )
    return names[0]


def recipe_as_stored(storage: BaseStorage, study_name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe in the format in which the study holds it, which an earlier version may have written.

    Args:
        storage: The storage; the study need not exist yet.
        study_name: Name of the study.
        recipe: ``Recipe.resolved`` as a dictionary.

    Raises:
        ValueError: The study belongs to another recipe.
    """
    if study_name not in optuna.get_all_study_names(storage):
        return recipe
    stored = recipe_of(optuna.load_study(study_name=study_name, storage=storage).user_attrs)
    if stored is None:
        return recipe
    check_same_settings(f"study {study_name!r}", comparable(stored, recipe), recipe, "another study name")
    return dict(stored)


def check_digests(study: Study, digests: dict[str, str]) -> None:
    """Checks that the study's trials had the same data; a study of an earlier version has no digests.

    Raises:
        ValueError: The data is other data.
    """
    stored = digests_of(study.user_attrs)
    both = stored.keys() & digests.keys()  # a worker that has the pruned model reads no calibration text
    was, now = ({f"digest of the {key}": values[key] for key in both} for values in (stored, digests))
    check_same_settings(f"study {study.study_name!r}", was, now, "another study name")


def warn_of_other_data(study: Study, inputs: Inputs) -> None:
    """Warns of data that is not what the study's trials had."""
    try:
        check_digests(study, inputs.digests())
    except ValueError:
        warnings.warn(
            f"the data has changed since study {study.study_name!r}: its recommendation is for other data, and the "
            "losses do not compare.",
            stacklevel=3,
        )


def recipe_folder(path: Path, recipe: Recipe) -> OutputFolder:
    """Returns a job's output folder, which belongs to one recipe.

    Raises:
        ValueError: It belongs to another recipe.
    """
    settings = recipe.resolved().to_dict()
    return OutputFolder(path, settings, partial(comparable, now=settings))


def check_modules(job: RecoveryObjective, modules: Iterable[Any], study_name: str, model: str | Path) -> None:
    """Checks that a model has the modules that a study searched.

    Raises:
        ValueError: It has others.
    """
    if sorted(map(str, job.space.modules)) != sorted(map(str, modules)):
        raise ValueError(f"the layers of {model} are not those that study {study_name!r} searched.")


def load_pruned_job(
    recipe: Recipe, pruned: Path | None, modules: Iterable[Any], study: Study, on_pruned: OnPruned | None = None
) -> RecoveryObjective:
    """Loads the pruned model of a study and returns its trial objective, without tasks.

    Args:
        recipe: The study's recipe.
        pruned: Folder of the pruned model. Default: pruned again as the recipe says.
        modules: The modules that the study searched.
        study: The study; a warning says where its trials had other data.
        on_pruned: See ``Inputs.objective``.

    Raises:
        ValueError: The model or data cannot be read, or it is not the model of the study.
    """
    inputs = Inputs(recipe, pruned)
    warn_of_other_data(study, inputs)
    job = inputs.objective(on_pruned, tasks=None)
    check_modules(job, modules, study.study_name, pruned or recipe.model)
    return job
