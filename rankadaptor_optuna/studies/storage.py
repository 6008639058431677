"""Create or resume a study in a shared database, and read what it is about."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study

from rankadaptor_optuna.attributes import RECIPE_ATTR
from rankadaptor_optuna.database import exclusively, patiently, reason
from rankadaptor_optuna.database import masked as masked
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.space import RankSpace

_HEARTBEAT_S = 60


def create_study(
    *,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    space: RankSpace | None = None,
    sampler: BaseSampler | None = None,
    direction: Literal["maximize", "minimize"] = "maximize",
    load_if_exists: bool = True,
    recipe: Mapping[str, Any] | None = None,
    pruner: BasePruner | None = None,
) -> Study:
    """Creates or resumes a study, safely for workers that start at the same moment on a fresh database.

    A database given by its URL gets Optuna's heartbeat, which queues the trial of a killed worker again.

    Args:
        storage: Any Optuna storage or its URL. Default: in memory.
        study_name: Name of the study. Default: made up by Optuna.
        space: What to search; used for the default sampler.
        sampler: Default: ``RankAdaptorSampler(space)``.
        direction: ``"maximize"`` or ``"minimize"``.
        load_if_exists: Whether to go on with a study of that name.
        recipe: What a trial is (model, pruning, data, training, ...), JSON-able. Stored with the study; a study with
            another recipe is refused, for its trials would not be comparable.
        pruner: Which trials are stopped by their reports. Default: Optuna's, ``MedianPruner``.

    Raises:
        ValueError: The storage cannot be opened, or the study belongs to another recipe.
    """
    opened = open_storage(storage) if isinstance(storage, str) else storage
    study = optuna.create_study(
        storage=opened,
        study_name=study_name,
        sampler=RankAdaptorSampler(space) if sampler is None else sampler,
        pruner=pruner,
        direction=direction,
        load_if_exists=load_if_exists,
    )
    if recipe is not None:
        check_recipe(study, recipe)
        study.set_user_attr(RECIPE_ATTR, dict(recipe))
    return study


def check_recipe(study: Study, recipe: Mapping[str, Any]) -> None:
    """Whether the study's trials are comparable with trials of ``recipe``.

    Raises:
        ValueError: The study belongs to another recipe; the message names what differs.
    """
    stored = study.user_attrs.get(RECIPE_ATTR)
    changed = [] if stored is None else differences(stored, recipe)
    if changed:
        what = "; ".join(changed)
        raise ValueError(
            f"study {study.study_name!r} belongs to other settings: {what}. Use those, or another study name."
        )


def differences(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What differs between a stored recipe and one as given; a missing setting is None, a tuple a list."""
    stored, now = _given(stored), _given(json.loads(json.dumps(recipe)))
    pairs = {key: (stored.get(key), now.get(key)) for key in sorted({*stored, *now})}
    return [f"{key} was {was!s:.60}, now {given!s:.60}" for key, (was, given) in pairs.items() if was != given]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drops settings that are None, at any depth: recipes of older versions lack settings that were added since."""
    return {
        key: _given(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value is not None
    }


def open_storage(url: str) -> RDBStorage:
    """Opens a database, creating Optuna's tables at most once however many workers start together.

    Raises:
        ValueError: It cannot be opened; the message carries no password.
    """
    try:
        engine = sqlalchemy.create_engine(url)
        with exclusively(engine):
            storage = patiently(lambda: _storage(url), engine)
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot open the storage {masked(url)}: {reason(error)}") from None
    return storage


def _storage(url: str) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat is one
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=1)
        return RDBStorage(url, heartbeat_interval=_HEARTBEAT_S, heartbeat_stale_trial_callback=retry)
