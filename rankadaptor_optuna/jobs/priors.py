"""The priors of a shared database, told and tidied: what ``rankadaptor priors`` prints."""

from __future__ import annotations

from rankadaptor_optuna.priors.choice import uses
from rankadaptor_optuna.priors.store import PriorStore, parse_reference
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.surrogate.prior import Prior, load_prior


def read_prior(prior: str, storage_url: str | None) -> Prior:
    """A prior by what a sampler would be given: ``db:NAME``, ``db:NAME@VERSION``, ``pretrained`` or a path.

    Raises:
        ValueError: It cannot be read, or is one of a database and no database was given.
    """
    if prior.startswith("db:"):
        if storage_url is None:
            raise ValueError(f"name the database that holds the prior {prior}.")
        return PriorStore(storage_url).load(*parse_reference(prior))
    found = load_prior(prior)
    assert found is not None
    return found


def prune_versions(storage_url: str, keep: int, name: str | None = None) -> str:
    """Removes old versions that no study uses; says which. See ``PriorStore.prune``."""
    removed = PriorStore(storage_url).prune(keep, name, uses(open_storage(storage_url)))
    return f"Removed {', '.join(map(str, removed)) or 'nothing'}."


def collect_unused(storage_url: str) -> str:
    """Removes what belongs to studies that are gone; says what. See ``PriorStore.collect``."""
    gone, versions = PriorStore(storage_url).collect(uses(open_storage(storage_url)))
    studies = sorted({use.study for use in gone})
    return (
        f"Forgot the uses of {len(studies)} deleted studies{': ' if studies else ''}{', '.join(studies)}. "
        f"Removed {', '.join(map(str, versions)) or 'no version'}."
    )
