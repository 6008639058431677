"""Shared databases by SQLAlchemy alone: opening one, one worker at a time, and errors without passwords."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy
from sqlalchemy import func, select

T = TypeVar("T")
_LOCK = 7_236_117_601  # any number, the same in every worker
_LOCK_S = 300
_ATTEMPTS = 10


def masked(url: str) -> str:
    """A database URL without its password, for messages."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        return "(not a database URL)"


def reason(error: Exception) -> str:
    """What a database says is wrong, in one line: without the statement, and without the URL."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]


@contextmanager
def exclusively(engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Connection]:
    """A connection that holds a lock among all workers on the database; SQLite has none to hold.

    Raises:
        RuntimeError: Another worker has held the lock for minutes.
    """
    with engine.connect() as connection:
        name = engine.dialect.name
        if name == "postgresql":  # ends with the connection's transaction
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        elif name in ("mysql", "mariadb") and connection.scalar(select(func.get_lock("rankadaptor", _LOCK_S))) != 1:
            raise RuntimeError(f"another worker has held the lock 'rankadaptor' for {_LOCK_S} s")
        try:
            yield connection
        finally:
            if name in ("mysql", "mariadb"):  # ends with the session, which a pool would keep
                connection.execute(select(func.release_lock("rankadaptor")))


def patiently(make: Callable[[], T], engine: sqlalchemy.Engine) -> T:
    """Creates tables, again where on SQLite, which has no lock, another worker was creating the same ones."""
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except sqlalchemy.exc.DBAPIError:
            if attempt == _ATTEMPTS - 1 or engine.dialect.name != "sqlite":
                raise
            time.sleep(random.uniform(0.05, 0.3))  # noqa: S311
    raise AssertionError("unreachable")
