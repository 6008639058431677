"""Shared databases through SQLAlchemy: one worker at a time, and messages without passwords."""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import sqlalchemy
from sqlalchemy import func, select

from rankadaptor_optuna.checks.extras import import_hint
from rankadaptor_optuna.checks.plain_text import one_line

T = TypeVar("T")
_LOCK = 7_236_117_601  # id of PostgreSQL's advisory lock; arbitrary, the same in every worker
_LOCK_S = 300  # seconds to wait for MySQL's lock; set by hand
_ATTEMPTS, _LONGEST_S = 10, 30  # at creating tables on SQLite, and seconds after which none begins; set by hand
# classes of PostgreSQL's errors and numbers of MySQL's: access denied, no such database, disk full, statement refused
_REFUSALS = frozenset(("28", "3D", "42", "53100", "22", 1021, 1044, 1045, 1049, 1142))
MASK = "***"
_SECRET = re.compile(r"pass|pwd|secret|token|odbc_connect", re.IGNORECASE)  # keys of a URL's query
_USER = r"(?:(?P<user>[^:/@?#]*)(?::(?P<password>[^@/?#]*))?@)?"
_ADDRESS = re.compile(_USER + r"(?P<place>(?:[^:/@?#\[\]]*|\[[^\]@/]*\])(?::\d*)?(?:/[^?@]*)?)")
_FILE = re.compile(_USER + r"(?P<place>(?:/.*)?)", re.DOTALL)


class UnreachableError(ValueError):
    """A database cannot be reached or denies access: nothing is known about its content."""


def masked(url: str | sqlalchemy.URL) -> str:
    """Returns a database URL without its password, for messages, files and notes.

    A URL that can be read in more than one way, such as one whose password has an unescaped ``@``, loses all but its
    scheme.
    """
    text = url.render_as_string(hide_password=False) if isinstance(url, sqlalchemy.URL) else str(url)
    scheme, found, rest = text.partition("://")
    if not found or not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme, re.ASCII):
        return "(not a database URL)"
    address, _, query = rest.partition("?")
    form = _FILE if scheme.startswith("sqlite") else _ADDRESS
    settings = [_masked_setting(each) for each in query.split("&") if each]
    if (match := form.fullmatch(address)) is None or any("@" in each for each in settings):
        return f"{scheme}://{MASK}"
    start = "" if match["user"] is None else match["user"] + (f":{MASK}" if match["password"] else "") + "@"
    return one_line(f"{scheme}://{start}{match['place']}{'?' if settings else ''}{'&'.join(settings)}")


def _masked_setting(text: str) -> str:
    """Returns a setting of a URL's query, ``KEY=VALUE``, without the value of a secret one."""
    key, found, _ = text.partition("=")
    return f"{key}={MASK}" if found and _SECRET.search(key) else text


def error_line(error: Exception, url: str | sqlalchemy.URL) -> str:
    """Returns a database's error in one line, without the statement and without the URL's passwords."""
    if isinstance(error, ImportError):  # the driver's
        return import_hint(error)
    line = one_line((str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0])
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: the port is not a number
        return "give a URL such as sqlite:///study.db or postgresql://user:password@host/db"
    if isinstance(error, sqlalchemy.exc.NoSuchModuleError):
        return (
            f"SQLAlchemy knows no database {parsed.drivername!r}; there are sqlite, postgresql and mysql, among others"
        )
    secrets = [str(parsed.password or ""), *(str(value) for key, value in parsed.query.items() if _SECRET.search(key))]
    for secret in secrets:
        line = line.replace(secret, MASK) if secret else line
    return line


def is_transient(error: BaseException) -> bool:
    """Returns whether a database's error may pass by itself: a lost connection, a restart, a lock."""
    if isinstance(error, sqlalchemy.exc.TimeoutError) or getattr(error, "connection_invalidated", False):
        return True
    if not isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return "locked" in str(error.orig) or "busy" in str(error.orig)
    code = getattr(error.orig, "sqlstate", None) or (getattr(error.orig, "args", None) or [None])[0]
    return not {code, str(code)[:2]} & _REFUSALS


def check_url(url: str | sqlalchemy.URL) -> None:
    """Checks that no part of a URL's password could be taken for its host, database or query.

    Raises:
        ValueError: An ``@`` is not escaped, or this is no URL; the message shows no part of it.
    """
    parsed = sqlalchemy.make_url(url)
    pieces = [parsed.host or "", "" if parsed.drivername.startswith("sqlite") else parsed.database or ""]
    pieces += [each.partition("=")[0] for each in str(url).partition("?")[2].split("&")]
    if any("@" in piece for piece in pieces):
        raise ValueError("its user, password or query has an @ that must be written as %40")


def check_file(engine: sqlalchemy.Engine) -> None:
    """Checks that the file of an SQLite database exists, as connecting to it would create it.

    Raises:
        ValueError: There is no such file.
    """
    file = engine.url.database or ""
    if engine.dialect.name != "sqlite" or file in ("", ":memory:") or engine.url.query.get("mode") == "memory":
        return
    path = unquote(urlsplit(file).path) if file.startswith("file:") else file
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")


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
    start = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except sqlalchemy.exc.DBAPIError:
            late = time.monotonic() - start > _LONGEST_S
            if attempt == _ATTEMPTS - 1 or late or engine.dialect.name != "sqlite":
                raise
            time.sleep(random.uniform(0.05, 0.3))  # noqa: S311
    raise AssertionError("unreachable")
