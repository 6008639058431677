"""PriorStore: versions of meta-learned priors in a shared database, in append-only tables beside Optuna's own.

A prior is named ``db:NAME`` (its newest version) or ``db:NAME@VERSION``. Versions count from 1; none is ever changed or
assigned twice. The tables also record the studies that use each version, without a foreign key to Optuna's tables, with
which ``optuna.delete_study`` would delete nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple, TypeVar

import sqlalchemy
from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.dialects.mysql import LONGBLOB, VARCHAR
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.types import NullType

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.connections import (
    UnreachableError,
    check_file,
    check_url,
    create_with_retries,
    error_line,
    exclusive_connection,
    masked,
)
from rankadaptor_optuna.surrogate.prior import Prior

T = TypeVar("T")
_ATTEMPTS = 100  # to write, each after a pause of up to 0.1 s; set by hand
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_REFERENCE = re.compile(rf"db:({_NAME})(?:@([1-9][0-9]{{0,8}}))?")
_MOST_VERSIONS = 10**9  # above the largest version that a reference names


def _text(length: int) -> Any:  # noqa: ANN401
    """A string column that is compared case-sensitively, unlike the default of MySQL and MariaDB."""
    exact = VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return String(length).with_variant(exact, "mysql", "mariadb")


_metadata = MetaData()
_priors = Table(
    "rankadaptor_priors",
    _metadata,
    Column("name", _text(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("made", DateTime, nullable=False),  # UTC
    Column("checksum", String(64), nullable=False),
    Column("weights", LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb"), nullable=False),
)
_uses = Table(
    "rankadaptor_prior_uses",
    _metadata,
    Column("study", _text(512), primary_key=True),
    Column("name", _text(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("elsewhere", Boolean, nullable=False),  # the study is in another storage
)


class Version(NamedTuple):
    """One version of a prior."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"db:{self.name}@{self.version}"


class Use(NamedTuple):
    """A study's use of a version."""

    study: str
    version: Version


@dataclass(frozen=True)
class StoredVersion:
    """Description of a version, without its weights.

    Attributes:
        version: Name and version.
        made: When it was added, UTC.
        n_bytes: Size of its weights and card.
        studies: Names of the studies that use it.
    """

    version: Version
    made: datetime
    n_bytes: int
    studies: tuple[str, ...]


def parse_reference(text: str) -> tuple[str, int | None]:
    """Returns the name and the version (None for the newest) of ``db:NAME`` or ``db:NAME@VERSION``.

    Raises:
        ValueError: ``text`` is neither.
    """
    if (match := _REFERENCE.fullmatch(text)) is None:
        raise ValueError(
            f"expected a prior like db:NAME or db:NAME@3 (letters, digits, '.', '_' and '-', 64 at most), got {text!r}."
        )
    return match[1], None if match[2] is None else int(match[2])


class PriorStore:
    """The priors in one database.

    Any number of processes may read and add at the same time, also on a database without the tables: the first write
    creates them. All methods raise ``UnreachableError``, a ``ValueError``, where the database cannot be reached or
    denies access; no message contains a password. Rows that this class cannot have written are no priors.

    Args:
        database: URL, or an engine.

    Attributes:
        url: URL of the database, without its password.

    Raises:
        ValueError: The URL is invalid.
    """

    def __init__(self, database: str | sqlalchemy.Engine) -> None:
        if isinstance(database, sqlalchemy.Engine):
            self._engine, self.url = database, masked(database.url)
            return
        self.url = masked(database)
        try:
            check_url(database)
            self._engine = sqlalchemy.create_engine(database, poolclass=sqlalchemy.NullPool)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise UnreachableError(
                f"the priors in {self.url} cannot be reached: {error_line(error, database)}"
            ) from None

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, ImportError, RuntimeError) as error:
            reason = error_line(error, self._engine.url)
            raise UnreachableError(f"the priors in {self.url} cannot be reached: {reason}") from None

    @property
    def _is_readable(self) -> bool:
        """Whether the tables exist; raises ``UnreachableError`` for a missing SQLite file, which is not created."""
        try:
            check_file(self._engine)
        except ValueError as error:
            raise UnreachableError(f"the priors in {self.url} cannot be reached: {error}") from None
        return self._has_tables

    @property
    def _has_tables(self) -> bool:
        inspector = sqlalchemy.inspect(self._engine)
        return all(inspector.has_table(table.name) for table in _metadata.sorted_tables)

    def _make_tables(self) -> None:
        if self._has_tables:
            return
        with exclusive_connection(self._engine):
            create_with_retries(lambda: _metadata.create_all(self._engine), self._engine)

    def add(self, name: str, prior: Prior) -> Version:
        """Adds a prior as the next version of a name.

        Raises:
            ValueError: The name is invalid, or has a version.
        """
        if parse_reference(f"db:{name}")[1] is not None:
            raise ValueError(
                f"expected a prior like db:NAME without a version (the next one is assigned), got {name!r}."
            )
        data = prior.dumps()
        row = {"name": name, "checksum": hashlib.sha256(data).hexdigest(), "weights": data}

        def write() -> Version:
            # in two transactions: within one that failed, a database may still show the old maximum
            version = Version(name, self._newest(name) + 1)
            with self._engine.begin() as connection:
                made = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0)
                connection.execute(insert(_priors).values(**row, version=version.version, made=made))
            return version

        return self._written(write)

    def _written(self, write: Callable[[], T]) -> T:
        """Returns the result of ``write``, called again where another writer was faster or holds a lock."""
        with self._named():
            self._make_tables()
            for attempt in range(_ATTEMPTS):
                try:
                    return write()
                except (IntegrityError, OperationalError):
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(random.uniform(0.01, 0.1))  # noqa: S311
        raise AssertionError("unreachable")

    def _newest(self, name: str) -> int:
        with self._engine.connect() as connection:
            known = (_priors.c.name == name) & _priors.c.version.between(1, _MOST_VERSIONS - 1)
            return connection.scalar(select(func.max(_priors.c.version)).where(known)) or 0

    def resolve(self, name: str, version: int | None = None) -> Version:
        """Returns the newest version of a name, or the given one.

        Raises:
            ValueError: It does not exist; the message lists versions that do.
        """
        there = [stored.version for stored in self.versions()]
        found = [v for v in there if v.name == name and version in (None, v.version)]
        if not found:
            wanted = f"db:{name}" if version is None else str(Version(name, version))
            others = ", ".join(map(str, there[-5:])) or "none at all"
            raise ValueError(f"there is no prior {wanted} in {self.url}; there is {others}.")
        return found[-1]

    def load(self, name: str, version: int | None = None) -> Prior:
        """Reads a version. Default: the newest.

        Raises:
            ValueError: The version does not exist, is corrupt, or has a format that is not read.
        """
        found = self.resolve(name, version)
        with self._named(), self._engine.connect() as connection:
            stored = select(_priors.c.checksum, type_coerce(_priors.c.weights, NullType)).where(_is(found))
            row = connection.execute(stored.limit(1)).one_or_none()
        if row is None:
            raise ValueError(f"the prior {found} was removed from {self.url} while it was read.")
        checksum, weights = row
        weights = bytes(weights) if isinstance(weights, (bytes, bytearray, memoryview)) else b""
        if (actual := hashlib.sha256(weights).hexdigest()) != checksum:
            raise ValueError(
                f"the prior {found} in {self.url} is corrupt: its checksum is {actual:.12}, {one_line(checksum):.12} "
                "was stored. Name another version, or train the prior again."
            )
        return Prior.loads(weights, f"prior {found} in {self.url}")

    def versions(self) -> list[StoredVersion]:
        """Returns all versions by name and number; none where the tables do not exist yet."""
        with self._named():
            if not self._is_readable:
                return []
            size = func.length(_priors.c.weights)
            with self._engine.connect() as connection:
                columns = _priors.c.name, _priors.c.version, type_coerce(_priors.c.made, NullType), size
                rows = connection.execute(select(*columns).order_by(_priors.c.name, _priors.c.version)).all()
                uses = self._read_uses(connection)
        by_version: dict[Version, list[str]] = {}
        for use in sorted(uses):
            by_version.setdefault(use.version, []).append(use.study)
        found = []
        for name, version, made, n_bytes in rows:
            with suppress(TypeError, ValueError):  # no version, or no time
                at = made if isinstance(made, datetime) else datetime.fromisoformat(made)
                known = Version(*parse_reference(f"db:{name}@{version}"))  # type: ignore[arg-type]
                found.append(StoredVersion(known, at, n_bytes or 0, tuple(by_version.get(known, ()))))
        return found

    @staticmethod
    def _read_uses(connection: sqlalchemy.Connection) -> dict[Use, bool]:
        rows = connection.execute(select(_uses.c.study, _uses.c.name, _uses.c.version, _uses.c.elsewhere))
        return {
            Use(study, Version(name, version)): bool(elsewhere)
            for study, name, version, elsewhere in rows
            if isinstance(study, str) and isinstance(name, str) and isinstance(version, int)
        }

    def use(self, study: str, version: Version, *, elsewhere: bool) -> None:
        """Records that a study uses a version, which is then not removed.

        Args:
            study: Name of the study.
            version: The version.
            elsewhere: Whether the study is in another storage, so that ``collect`` cannot tell if it still exists.
        """
        key = {"study": study, **version._asdict()}

        def write() -> None:
            with self._engine.begin() as connection:
                if Use(study, version) not in self._read_uses(connection):
                    connection.execute(insert(_uses).values(**key, elsewhere=elsewhere))

        self._written(write)

    def prune(self, keep: int, name: str | None = None, used: Collection[Use] = ()) -> list[Version]:
        """Removes old versions that no study uses.

        Args:
            keep: Number of the newest versions of each name that stay in any case, at least 1.
            name: Name whose versions are removed. Default: all names.
            used: Further uses that keep a version.

        Returns:
            The removed versions.

        Raises:
            ValueError: ``keep`` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: the newest version is never removed.")
        held = {use.version for use in used}
        by_name: dict[str, list[Version]] = {}
        for stored in self.versions():
            if name in (None, stored.version.name):
                by_name.setdefault(stored.version.name, []).append(stored.version)
            if stored.studies:
                held.add(stored.version)
        old = [v for versions in by_name.values() for v in versions[:-keep] if v not in held]
        self._remove(old, [])
        return old

    def collect(self, used: Collection[Use]) -> tuple[list[Use], list[Version]]:
        """Removes the uses of deleted studies, and the old versions that only these used.

        Args:
            used: The uses of all studies that still exist in this database.

        Returns:
            The removed uses and versions.
        """
        everything = [stored.version for stored in self.versions()]
        if not everything:
            return [], []
        with self._named(), self._engine.connect() as connection:
            uses = self._read_uses(connection)
        gone = sorted(use for use, elsewhere in uses.items() if not elsewhere and use not in used)
        held = {use.version for use in (*(uses.keys() - set(gone)), *used)}
        newest = {version.name: version for version in everything}.values()
        orphans = sorted({use.version for use in gone} & set(everything) - held - set(newest))
        self._remove(orphans, gone)
        return gone, orphans

    def _remove(self, versions: list[Version], uses: list[Use]) -> None:
        def write() -> None:
            with self._engine.begin() as connection:
                for version in versions:
                    connection.execute(delete(_priors).where(_is(version)))
                for study, version in uses:
                    key = tuple_(_uses.c.study, _uses.c.name, _uses.c.version)
                    connection.execute(delete(_uses).where(key == (study, *version)))

        if versions or uses:
            self._written(write)


def _is(version: Version) -> sqlalchemy.ColumnElement[bool]:
    return (_priors.c.name == version.name) & (_priors.c.version == version.version)
