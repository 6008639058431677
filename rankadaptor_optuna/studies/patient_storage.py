"""PatientStorage: Optuna's database storage, for workers that outlive restarts of the database, pauses and kills.

All that this package works around in Optuna's storages stands here. Optuna 4.9 to 5.0 need it:

* A lost connection raises, in the heartbeat's thread too, which then ends: the trial's result is lost, another worker
  runs it again meanwhile, and ``optimize`` dies of an assertion. Here every call waits for the database.
* Heartbeats begin after ``ask`` has proposed parameters and exist in ``optimize`` only: a trial whose worker is killed
  before stays RUNNING. Here heartbeats begin with the trial and end with it, or with the process.
* A worker that was paused beyond the grace period dies of ``Cannot tell a FAIL trial``. Here it warns and goes on.
* A trial that failed for want of heartbeats is queued with its parameters, but without ranks that were only announced.
* Optuna replaces an attribute, whoever has set it meanwhile. Here an attribute can be set for the first time only.
* ``optimize`` lets a trial fail that Ctrl-C interrupts. Here it waits for a worker, with its number and parameters.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._rdb import models
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from rankadaptor_optuna.database.attributes import RECIPE_ATTR
from rankadaptor_optuna.database.connections import UnreachableError, error_line, is_transient, masked
from rankadaptor_optuna.sampling.trials import announced_ranks
from rankadaptor_optuna.studies.reading import study_space

T = TypeVar("T")
PATIENCE_S = 600.0  # longest time to wait for a database; above the grace period of two heartbeats; set by hand
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # between two attempts, doubled each time; set by hand
_CONNECT_S = 10  # longest time of an attempt to connect; set by hand
_LOCKED_S = 60  # time that SQLite waits for another writer; set by hand
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class PatientStorage(RDBStorage):
    """Optuna's database storage; calls wait for a database that is away, and trials of this process have heartbeats.

    Args:
        url: Database URL.
        heartbeat_interval: Seconds between two heartbeats; a trial without any for twice as long has lost its worker.
        patience: Longest time to wait for the database, in seconds.
    """

    def __init__(self, url: str, *, heartbeat_interval: int, patience: float = PATIENCE_S) -> None:
        self.patience = patience
        self._prepare()
        super().__init__(
            url,
            engine_kwargs=_engine_options(sqlalchemy.make_url(url)),
            heartbeat_interval=heartbeat_interval,
            grace_period=2 * heartbeat_interval,
            heartbeat_stale_trial_callback=QueueAgain(max_retry=1),
        )

    def _prepare(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._last_away = float("-inf")
        self._own: set[int] = set()  # ids of running trials of this process
        self._lost: set[int] = set()  # those of them that other workers took for dead
        self._beating: threading.Thread | None = None
        self._first_seen: dict[int, float] = {}  # running trials without any heartbeat

    def __getstate__(self) -> dict[Any, Any]:
        """Leaves out what belongs to this process."""
        fresh = {"_local", "_lock", "_away_since", "_last_away", "_own", "_lost", "_beating", "_first_seen"}
        return {key: value for key, value in super().__getstate__().items() if key not in fresh}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restores a pickled storage."""
        self._prepare()
        super().__setstate__(state)

    def _patient(self, call: Callable[[], T]) -> T:
        """Returns the result of a call, repeated while the database is away.

        Raises:
            UnreachableError: The database was away for longer than ``patience``.
            ValueError: The database refused the call.
        """
        if getattr(self._local, "waits", False):  # the outermost call of Optuna's methods waits
            return call()
        self._local.waits, start, pause = True, time.monotonic(), _FIRST_PAUSE_S
        try:
            while True:
                try:
                    result = call()
                except sqlalchemy.exc.IntegrityError:
                    raise  # Optuna's methods handle it
                except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
                    self._note_away(error, time.monotonic() - start)
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
                else:
                    self._note_back()
                    return result
        finally:
            self._local.waits = False

    def _note_away(self, error: Exception, waited: float) -> None:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        name, reason = masked(self.url), error_line(cause, self.url)  # type: ignore[arg-type]
        if not is_transient(cause):
            raise ValueError(f"the database {name} refused: {reason}") from error
        if waited >= self.patience:
            raise UnreachableError(f"the database {name} was away for {waited:.0f} s: {reason}") from None
        with self._lock:
            first, self._last_away = self._away_since is None, time.monotonic()
            if first:
                self._away_since = self._last_away
        if first:
            _logger.warning(f"Waiting up to {self.patience:.0f} s for the database {name}: {reason}")

    def _note_back(self) -> None:
        with self._lock:
            since, self._away_since = self._away_since, None
        if since is not None:
            _logger.warning(f"The database {masked(self.url)} is back after {time.monotonic() - since:.0f} s.")

    # Trials of this process: their heartbeats, and what happens when another worker took one for dead.

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """Creates a trial; a running trial begins with a heartbeat."""
        trial = self._patient(partial(super()._create_new_trial, study_id, template_trial))
        if trial.state is TrialState.RUNNING:
            self._beat(trial._trial_id)
        return trial

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Sets state and values, unless another worker has taken this process's trial for dead."""
        if state is TrialState.RUNNING:  # before others can see an old heartbeat
            self.record_heartbeat(trial_id)
        elif state is TrialState.FAIL and trial_id in self._own and _is_interrupted():
            state = TrialState.WAITING
        store, attempts = partial(super().set_trial_state_values, trial_id, state, values), 0
        read = partial(super().get_trial, trial_id)

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                return store()
            except UpdateFinishedTrialError:
                if attempts > 1 and read().state is state:  # stored, but the answer was lost with the connection
                    return True
                raise

        done = self._patient(self._of_own_trial(trial_id, attempt, True))
        with self._lock:
            self._lost.discard(trial_id)
            self._own.discard(trial_id)
        if done and state is TrialState.RUNNING:
            self._beat(trial_id)
        return done

    def _of_own_trial(self, trial_id: int, write: Callable[[], T], otherwise: T) -> Callable[[], T]:
        """Returns ``write``, which warns instead of raising where another worker took this process's trial for dead."""

        def written() -> T:
            try:
                return write()
            except UpdateFinishedTrialError:
                with self._lock:
                    if trial_id not in self._own:
                        raise
                    first = trial_id not in self._lost
                    self._lost.add(trial_id)
                if first:
                    number = RDBStorage.get_trial(self, trial_id).number
                    _logger.warning(
                        f"Trial {number} was given to another worker while this one was paused or cut off; "
                        "its result is dropped."
                    )
                return otherwise

        return written

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Returns a trial; a trial of this process runs until this process ends it."""
        return self._as_own(self._patient(partial(super().get_trial, trial_id)))

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:  # noqa: ANN401
        return [self._as_own(trial) for trial in self._patient(partial(super()._get_trials, *args, **kwargs))]

    def _as_own(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.state is not TrialState.FAIL or trial._trial_id not in self._own:
            return trial
        running = copy.copy(trial)
        running.state, running.datetime_complete = TrialState.RUNNING, None
        return running

    def _beat(self, trial_id: int) -> None:
        """Records a heartbeat now, and others until the trial or the process ends."""
        self.record_heartbeat(trial_id)
        with self._lock:
            self._own.add(trial_id)
            # each thread has an SQLite database in memory of its own
            if self._beating is None and self.engine.url.database not in (None, "", ":memory:"):
                self._beating = threading.Thread(target=self._keep_beating, name="heartbeats", daemon=True)
                self._beating.start()

    def _keep_beating(self) -> None:
        while True:
            with self._lock:
                own = list(self._own)
                if not own:
                    self._beating = None
                    return
            alive = [self.record_heartbeat(trial_id) for trial_id in own]
            # again as soon as the database is back
            threading.Event().wait(self.heartbeat_interval if all(alive) else 1)

    def record_heartbeat(self, trial_id: int) -> bool:  # type: ignore[override]
        """Records a heartbeat; returns whether it was stored. Optuna's own thread calls it, too."""
        try:
            super().record_heartbeat(trial_id)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
            self._last_away = time.monotonic()
            return False
        return True

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Returns ids of trials without heartbeats for the grace period, in which the database was never away."""
        grace = self.grace_period or 0
        stale = self._patient(partial(super()._get_stale_trial_ids, study_id))
        stale += self._patient(partial(self._without_heartbeats, study_id, grace))
        if time.monotonic() - self._last_away < grace:
            return []
        return [trial_id for trial_id in stale if trial_id not in self._own]

    def _without_heartbeats(self, study_id: int, grace: float) -> list[int]:
        """Returns ids of trials that have had no heartbeat at all since this process saw them a grace period ago.

        Only of studies with a recipe, whose workers all have heartbeats; other studies may have workers without.
        """
        trial, heartbeat = models.TrialModel, models.TrialHeartbeatModel
        query = sqlalchemy.select(trial.trial_id).outerjoin(heartbeat, heartbeat.trial_id == trial.trial_id)
        query = query.where(trial.study_id == study_id, trial.state == TrialState.RUNNING)
        with self.engine.connect() as connection:
            ids = connection.scalars(query.where(heartbeat.trial_id.is_(None))).all()
        if not ids or RECIPE_ATTR not in self.get_study_user_attrs(study_id):
            return []
        now = time.monotonic()
        self._first_seen = {trial_id: self._first_seen.get(trial_id, now) for trial_id in ids}
        return [trial_id for trial_id, seen in self._first_seen.items() if now - seen > grace]

    def set_first_study_user_attr(self, study_id: int, key: str, value: Any) -> None:  # noqa: ANN401
        """Sets an attribute that the study does not have; one that it has stays, even if it was set a moment ago."""
        table = models.StudyUserAttributeModel.__table__
        row = sqlalchemy.insert(table).values(study_id=study_id, key=key, value_json=json.dumps(value))

        def write() -> None:
            try:
                with self.engine.begin() as connection:
                    connection.execute(row)
            except sqlalchemy.exc.IntegrityError:
                pass

        self._patient(write)


class QueueAgain(RetryHeartbeatStaleTrialCallback):
    """Queues a trial again whose worker was lost, with the ranks that were announced but not stored yet."""

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Queues a copy of a failed trial."""
        names: list[str] = []
        with suppress(ValueError):  # what is stored is no space
            names = list(getattr(study_space(study), "names", ()))
        ranks = dict(zip(names, announced_ranks(trial, names) or (), strict=False))
        missing = {name: rank for name, rank in ranks.items() if name not in trial.params}
        if missing:
            fixed = trial.system_attrs.get("fixed_params")
            trial.system_attrs["fixed_params"] = {**missing, **(fixed if isinstance(fixed, dict) else {})}
        super().__call__(study, trial)


def _is_interrupted() -> bool:
    """Returns whether ``optimize`` ends a trial whose objective Ctrl-C has interrupted: only its frame knows."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_run_trial" and "func_err" in frame.f_locals:
            return isinstance(frame.f_locals["func_err"], KeyboardInterrupt)
    return False


def hand_back(study: Study, trial: Trial) -> None:
    """Lets a running trial wait for a worker, with the number and the parameters that it has."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def _waits(name: str) -> Callable[..., Any]:
    original = getattr(RDBStorage, name)

    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._patient(partial(original, self, *args, **kwargs))

    return call


def _writes_own_trial(name: str) -> Callable[..., Any]:
    original = getattr(RDBStorage, name)

    def call(self: PatientStorage, trial_id: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        write = partial(original, self, trial_id, *args, **kwargs)
        return self._patient(self._of_own_trial(trial_id, write, None))

    return call


for _name in (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id",
):
    setattr(PatientStorage, _name, _waits(_name))
for _name in (
    "set_trial_param",
    "_set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
):
    setattr(PatientStorage, _name, _writes_own_trial(_name))


def _engine_options(url: sqlalchemy.URL) -> dict[str, Any]:
    """Returns SQLAlchemy's options: connections are tested before use, and waits for a server or a lock are bounded."""
    backend, driver = url.get_backend_name(), url.get_driver_name()
    if backend == "sqlite":
        return {} if "timeout" in url.query else {"connect_args": {"timeout": _LOCKED_S}}
    bounded = driver.startswith("psycopg") or driver in ("pymysql", "mysqldb")
    connect = {"connect_timeout": _CONNECT_S} if bounded and "connect_timeout" not in url.query else {}
    return {"pool_pre_ping": True, "connect_args": connect}


class _WithoutStatements(logging.Filter):
    """Drops Optuna's warning that a query failed, which holds the whole statement; the query is repeated."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is shown."""
        return not str(record.msg).startswith("Caught an error from sqlalchemy")


logging.getLogger("optuna.storages._rdb.storage").addFilter(_WithoutStatements())
