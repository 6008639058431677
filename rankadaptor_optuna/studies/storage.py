"""Creates, opens and resumes studies in a shared database, and checks that their trials are comparable."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study

from rankadaptor_optuna.database.attributes import RECIPE_ATTR, recipe_of
from rankadaptor_optuna.database.connections import (
    check_file,
    check_url,
    create_with_retries,
    error_line,
    exclusive_connection,
    is_transient,
    masked,
)
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.patient_storage import PATIENCE_S, PatientStorage

_HEARTBEAT_S = 60  # interval; a killed worker is noticed after two; set by hand
_TABLES = ("studies", "trials", "version_info")  # some of Optuna's: another program may have studies, too
_LONGEST_NAME = 512  # characters of a study name in Optuna's tables
_logger = optuna.logging.get_logger(f"optuna.{__name__}")
_MOST_NAMED = 5  # differing settings in a message
_MOST_SHOWN = 60  # characters of a setting in a message


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

    With a database URL, workers wait up to 10 minutes for a database that is away, and Optuna's heartbeat is on: the
    trial of a killed worker is run again.

    Args:
        storage: Any Optuna storage or its URL. Default: in memory.
        study_name: Name of the study. Default: chosen by Optuna.
        space: The rank space of the default sampler.
        sampler: The sampler. Default: ``RankAdaptorSampler(space)``.
        direction: ``"maximize"`` or ``"minimize"``.
        load_if_exists: Whether to resume a study of that name.
        recipe: Settings of a trial (model, pruning, data, training, ...), JSON-able. They are stored with the study; a
            study with another recipe is refused, as its trials are not comparable.
        pruner: Optuna pruner, which stops trials by their reports. Default: Optuna's ``MedianPruner``.

    Raises:
        ValueError: The name is too long, the storage cannot be opened, or the study belongs to another recipe.
    """
    check_study_name(study_name)
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
        backend = getattr(study._storage, "_backend", None)
        if isinstance(backend, PatientStorage):  # of two workers that begin together, the first recipe counts
            backend.set_first_study_user_attr(study._study_id, RECIPE_ATTR, dict(recipe))
        elif recipe_of(study.user_attrs) is None:
            study.set_user_attr(RECIPE_ATTR, dict(recipe))
        check_recipe(study, recipe)
    return study


def check_study_name(name: str | None) -> None:
    """Checks that all databases can hold a study's name.

    Raises:
        ValueError: It is empty or too long, or has a zero byte or invalid Unicode.
    """
    if name is None:
        return
    broken = any("\ud800" <= character <= "\udfff" for character in name)  # surrogates: bytes that are not UTF-8
    if not name.strip() or len(name) > _LONGEST_NAME or "\0" in name or broken:
        raise ValueError(
            f"a study name has 1 to {_LONGEST_NAME} characters, not only spaces, all of them valid Unicode and none "
            f"a zero byte, got {len(name)}: {name!r:.60}."
        )


def check_recipe(study: Study, recipe: Mapping[str, Any]) -> None:
    """Checks that the study's trials are comparable with trials of ``recipe``.

    Raises:
        ValueError: The study belongs to another recipe; the message names the differences.
    """
    stored = recipe_of(study.user_attrs)
    if stored is not None:
        check_same_settings(f"study {study.study_name!r}", stored, recipe, "another study name")


def check_same_settings(owner: str, stored: Mapping[str, Any], given: Mapping[str, Any], other: str) -> None:
    """Checks that settings are those stored with a study or a folder; a missing setting is None, a tuple a list.

    Args:
        owner: The study or folder, for the message.
        stored: Its settings.
        given: Settings of this run, JSON-able.
        other: The alternative that the message offers.

    Raises:
        ValueError: Settings differ; the message names the first of them with both values.
    """
    was, now = (_leaves(json.loads(json.dumps(settings))) for settings in (stored, given))
    keys = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    if keys:
        pairs = {key: _around_difference(str(was.get(key)), str(now.get(key))) for key in keys[:_MOST_NAMED]}
        named = [f"{key} was {before}, now {after}" for key, (before, after) in pairs.items()]
        more = [f"and {len(keys) - _MOST_NAMED} more"] if len(keys) > _MOST_NAMED else []
        raise ValueError(f"{owner} belongs to other settings: {'; '.join(named + more)}. Use those, or {other}.")


def _around_difference(was: str, now: str) -> tuple[str, str]:
    """Returns two texts, cut to 60 characters around their first difference where one is longer."""
    same = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, same - 20) if max(len(was), len(now)) > _MOST_SHOWN else 0
    end = start + _MOST_SHOWN
    before, after = (f"{'...' * (start > 0)}{text[start:end]}{'...' * (len(text) > end)}" for text in (was, now))
    return before, after


def _leaves(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted key; None as if missing: recipes of older versions lack newer settings."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{path}{key}.")
        elif value is not None:
            found[f"{path}{key}"] = value
    return found


def open_storage(url: str, *, create: bool = True, patience: float = PATIENCE_S) -> PatientStorage:
    """Opens a database and creates Optuna's tables, once even where many workers start together.

    Args:
        url: Database URL.
        create: Whether to create what is missing: an SQLite file, Optuna's tables.
        patience: Longest time to wait, once it is open, for a database that is away, in seconds.

    Raises:
        ValueError: The database cannot be opened; the message has no password.
    """
    try:
        check_url(url)
        engine = sqlalchemy.create_engine(url)
        if not create:
            check_file(engine)
            if not {*_TABLES} <= {*sqlalchemy.inspect(engine).get_table_names()}:
                raise ValueError("it has no studies")
        elif engine.dialect.name == "sqlite":
            _note_lock(engine)
        with exclusive_connection(engine):
            storage = create_with_retries(lambda: _storage(url, patience), engine)
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot open the storage {masked(url)}: {error_line(error, url)}") from None
    return storage


def _note_lock(engine: sqlalchemy.Engine) -> None:
    """Logs that another program holds an SQLite file locked, which SQLite waits for in silence."""
    try:
        sqlalchemy.inspect(engine).get_table_names()
    except sqlalchemy.exc.OperationalError as error:
        if not is_transient(error):
            raise
        _logger.warning(f"Waiting for the database {masked(engine.url)}: {error_line(error, engine.url)}")


def _storage(url: str, patience: float) -> PatientStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
        return PatientStorage(url, heartbeat_interval=_HEARTBEAT_S, patience=patience)
