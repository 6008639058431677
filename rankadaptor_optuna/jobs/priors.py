"""Read and tidy the priors of a shared database."""

from __future__ import annotations

from rankadaptor_optuna.jobs.results import Collected
from rankadaptor_optuna.priors.choice import uses
from rankadaptor_optuna.priors.store import PriorStore, Version, parse_reference
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.surrogate.prior import Prior, load_prior


def read_prior(prior: str, storage_url: str | None) -> Prior:
    """Loads a prior by the reference that a sampler takes: ``db:NAME``, ``db:NAME@VERSION``, ``pretrained`` or a path.

    Raises:
        ValueError: The prior cannot be read, or it is in a database and ``storage_url`` is None.
    """
    if prior.startswith("db:"):
        if storage_url is None:
            raise ValueError(f"name the database that holds the prior {prior}.")
        return PriorStore(storage_url).load(*parse_reference(prior))
    found = load_prior(prior)
    assert found is not None
    return found


def prune_versions(storage_url: str, keep: int, name: str | None = None) -> list[Version]:
    """Removes old versions that no study uses; returns them. See ``PriorStore.prune``."""
    return PriorStore(storage_url).prune(keep, name, uses(open_storage(storage_url, create=False)))


def collect_unused(storage_url: str) -> Collected:
    """Removes the uses of deleted studies, and the old versions that only they used. See ``PriorStore.collect``."""
    gone, versions = PriorStore(storage_url).collect(uses(open_storage(storage_url, create=False)))
    return Collected(sorted({use.study for use in gone}), versions)
