"""PriorChoice: finds the prior of a study, which is the version with which the study began."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Literal, TypeAlias

import optuna
import sqlalchemy
from optuna.storages import BaseStorage
from optuna.study import Study

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.attributes import PRIOR_ATTR, identity_of
from rankadaptor_optuna.database.connections import UnreachableError
from rankadaptor_optuna.priors.store import PriorStore, Use, Version, parse_reference
from rankadaptor_optuna.surrogate.prior import Prior, load_prior

_NONE, _SHIPPED, _CUSTOM = "none", "pretrained", "custom"  # kinds of identities, besides db:NAME@VERSION
OnBadPrior: TypeAlias = Literal["raise", "pretrained"]
Given: TypeAlias = Prior | str | os.PathLike[str] | None
_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class PriorChoice:
    """A prior as a user gave it; finds the prior of each study.

    A study keeps the prior with which it began. The prior's identity is stored with the study (``none``,
    ``pretrained:CHECKSUM``, ``db:NAME@VERSION``, or ``custom:CHECKSUM`` for any other) and takes precedence over the
    given prior when the study is resumed or read. Every parameter that takes a prior takes a ``PriorChoice``, too.

    Args:
        given: ``"pretrained"`` (shipped), None, a path, a ``Prior``, ``"db:NAME"`` (the newest version) or
            ``"db:NAME@VERSION"``.
        storage: URL of the database that holds ``db:`` priors. Default: the study's own storage.
        on_bad: Reaction to a prior that is missing, corrupt or of a newer format: ``"raise"``, or ``"pretrained"``:
            warn and use the shipped prior, in this process only. A database that cannot be reached raises in any case.

    Raises:
        ValueError: The prior cannot be read, or ``on_bad`` is unknown.
    """

    def __init__(
        self,
        given: Given = "pretrained",
        *,
        storage: str | None = None,
        on_bad: OnBadPrior = "raise",
    ) -> None:
        if on_bad not in ("raise", "pretrained"):
            raise ValueError(f'on_bad_prior must be "raise" or "pretrained", got {on_bad!r}.')
        self._storage, self._on_bad = storage, on_bad
        self._is_default = given == "pretrained" if isinstance(given, str) else False
        self._reference: tuple[str, int | None] | None = None
        self._known: dict[tuple[str, str], Prior | None] = {}  # by identity and the database's URL
        self._own, self._own_fell_back = _NONE, False
        self._warned: set[str] = set()
        if isinstance(given, str) and given.startswith("db:"):
            self._reference = parse_reference(given)
            return
        try:
            self._own = self._keep(given if isinstance(given, Prior) else load_prior(given), given == "pretrained")
        except ValueError as error:
            self._own, self._own_fell_back = self._fallen_back(error), True

    @classmethod
    def of(cls, given: PriorLike) -> PriorChoice:
        """Returns ``given`` where it is a choice, else a choice of it."""
        return given if isinstance(given, PriorChoice) else cls(given)

    def _keep(self, prior: Prior | None, is_shipped: bool) -> str:
        """Remembers a prior that is in no database, and returns its identity."""
        identity = _NONE if prior is None else f"{_SHIPPED if is_shipped else _CUSTOM}:{prior.checksum}"
        self._known[identity, ""] = prior
        return identity

    def _fallen_back(self, error: ValueError) -> str:
        """Returns the identity of the shipped prior, with a warning.

        Raises:
            ValueError: ``on_bad`` is ``"raise"``, or the database cannot be reached; this is ``error``.
        """
        if self._on_bad == "raise" or isinstance(error, UnreachableError):
            raise error
        self._warn(f"{error} Going on with the shipped prior.")
        return self._keep(load_prior("pretrained"), True)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _logger.warning(message)

    def find(self, study: Study) -> Prior | None:
        """Returns the prior of a study, without writing to it.

        Raises:
            ValueError: The prior cannot be read; the message names it and the reason.
        """
        return self._resolved(study, _attribute(study))[1]

    def settle(self, study: Study, stored: str | None) -> Prior | None:
        """Returns the prior of a study that is searched, and stores its identity where that is new.

        Args:
            study: The study.
            stored: The identity that the study's storage holds, None where it holds none.

        Raises:
            ValueError: The prior cannot be read; the message names it and the reason.
        """
        identity, prior = self._resolved(study, stored)
        if stored is not None and not self._is_default and not self._agrees(stored):
            self._warn(f"study {study.study_name!r} began with the prior {one_line(stored)} and keeps it.")
        if identity in (stored, None):
            return prior
        study._storage.set_study_user_attr(study._study_id, PRIOR_ATTR, identity)
        if identity.startswith("db:"):
            store, elsewhere = self._store(study)
            store.use(study.study_name, _version(identity), elsewhere=elsewhere)
        # where several workers begin at the same moment, the last writer's identity counts for all of them
        return self.find(study)

    def _agrees(self, stored: str) -> bool:
        """Whether a stored identity is that of the given prior."""
        if self._reference is None:
            return stored == self._own
        name, version = self._reference
        return stored.startswith(f"db:{name}@") and (version is None or stored == str(Version(name, version)))

    def _resolved(self, study: Study, stored: str | None) -> tuple[str | None, Prior | None]:
        """Identity and prior of a study: stored, else given, else (``on_bad``) None and the shipped prior."""
        try:
            if stored is not None:
                identity = stored
            elif self._reference is None:
                identity = self._own
            else:
                identity = str(self._store(study)[0].resolve(*self._reference))
            prior = self._prior(study, identity)
            return None if stored is None and self._own_fell_back else identity, prior
        except ValueError as error:
            return None, self._known[self._fallen_back(error), ""]

    def _prior(self, study: Study, identity: str) -> Prior | None:
        """The prior with an identity, read once."""
        store = self._store(study)[0] if identity.startswith("db:") else None
        key = identity, "" if store is None else store.url
        if key not in self._known:
            self._known[key] = self._read(study, identity) if store is None else store.load(*_version(identity))
        return self._known[key]

    def _read(self, study: Study, identity: str) -> Prior | None:
        """Reads the prior with an identity that is in no database and was not given."""
        kind, _, checksum = identity.partition(":")
        if kind == _NONE:
            return None
        if kind == _SHIPPED:
            shipped = load_prior("pretrained")
            if shipped is not None and shipped.checksum != checksum:
                self._warn(f"study {study.study_name!r} began with the shipped prior of another version ({checksum}).")
            return shipped
        if kind == _CUSTOM:
            raise ValueError(
                f"study {study.study_name!r} began with a prior of its own, of checksum {checksum}: give that file as "
                "the prior."
            )
        raise ValueError(f"study {study.study_name!r} has the prior {identity!r}, which this version does not know.")

    def _store(self, study: Study) -> tuple[PriorStore, bool]:
        """The store of ``db:`` priors, and whether it is in another database than the study."""
        own = engine_of(study._storage)
        if self._storage is not None:
            return PriorStore(self._storage), own is None or own.url != sqlalchemy.make_url(self._storage)
        if own is None:
            raise ValueError(
                f"study {study.study_name!r} is in no database that could hold priors; name one: "
                "prior_storage='sqlite:///priors.db'."
            )
        return PriorStore(own), False


PriorLike: TypeAlias = PriorChoice | Given


def engine_of(storage: BaseStorage) -> sqlalchemy.Engine | None:
    """Returns the database engine of an Optuna storage; None where it has none (in memory, journal, gRPC)."""
    return getattr(getattr(storage, "_backend", storage), "engine", None)


def uses(storage: BaseStorage) -> list[Use]:
    """Returns the uses of ``db:`` priors by the studies of a storage."""
    found = []
    for study in optuna.get_all_study_summaries(storage, include_best_trial=False):
        with suppress(ValueError):  # no version
            found.append(Use(study.study_name, _version(str(study.user_attrs.get(PRIOR_ATTR)))))
    return found


def _attribute(study: Study) -> str | None:
    # read from the storage: under Hyperband, Optuna hides a study's attributes
    return identity_of(study._storage.get_study_user_attrs(study._study_id))


def _version(identity: str) -> Version:
    name, version = parse_reference(identity)
    if version is None:
        raise ValueError(f"expected a prior's version like db:NAME@3, got {identity!r}.")
    return Version(name, version)
