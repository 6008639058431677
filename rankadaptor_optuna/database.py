"""Shared databases through SQLAlchemy: one worker at a time, and messages without passwords."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy
from sqlalchemy import func, select

T = TypeVar("T")
_LOCK = 7_236_117_601  # id of PostgreSQL's advisory lock; arbitrary, the same in every worker
_LOCK_S = 300  # seconds to wait for MySQL's lock; set by hand
_ATTEMPTS = 10  # at creating tables on SQLite; set by hand


class UnreachableError(ValueError):
    """A database cannot be reached or denies access: nothing is known about its content."""


def masked(url: str) -> str:
    """Returns a database URL without its password, for messages."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: the port is not a number
        return "(not a database URL)"


def error_line(error: Exception) -> str:
    """Returns a database's error in one line, without the statement and the URL."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]


@contextmanager
def exclusive_connection(engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Connection]:
    """Opens a connection that holds a lock among all workers on the database, except on SQLite, which has none.

    Raises:
        RuntimeError: Another worker has held the lock for 5 minutes (MySQL and MariaDB).
    """
    with engine.connect() as connection:
        name = engine.dialect.name
        if name == "postgresql":  # released at the end of the transaction
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        elif name in ("mysql", "mariadb") and connection.scalar(select(func.get_lock("rankadaptor", _LOCK_S))) != 1:
            raise RuntimeError(f"another worker has held the lock 'rankadaptor' for {_LOCK_S} s")
        try:
            yield connection
        finally:
            if name in ("mysql", "mariadb"):  # its session lives on in the connection pool
                connection.execute(select(func.release_lock("rankadaptor")))


def create_with_retries(make: Callable[[], T], engine: sqlalchemy.Engine) -> T:
    """Creates tables; tries again on SQLite, which has no lock, where another worker was creating the same tables."""
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except sqlalchemy.exc.DBAPIError:
            if attempt == _ATTEMPTS - 1 or engine.dialect.name != "sqlite":
                raise
            time.sleep(random.uniform(0.05, 0.3))  # noqa: S311
    raise AssertionError("unreachable")
