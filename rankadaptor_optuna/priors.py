"""The priors of a shared database, told and tidied: what ``rankadaptor priors`` prints."""

from __future__ import annotations

from rankadaptor_optuna.study import open_storage
from rankadaptor_optuna.study_prior import uses
from rankadaptor_optuna.surrogate.prior import Prior, load_prior
from rankadaptor_optuna.surrogate.store import PriorStore, Stored, parse_reference


def table(storage_url: str) -> list[list[str]]:
    """A row for each version, a head first; what is wrong with it where it cannot be read."""
    store = PriorStore(storage_url)
    head = ["prior", "made (UTC)", "bytes", "tasks", "gain", "used by"]
    return [head, *(_row(store, stored) for stored in store.versions())]


def _row(store: PriorStore, stored: Stored) -> list[str]:
    try:
        card = store.load(*stored.version).card
        gain = card.get("held_out", {}).get("gain")
        told = [str(len(card.get("tasks", []))), "-" if gain is None else f"{gain:+.2f}"]
    except ValueError:
        told = ["unreadable", "-"]
    return [str(stored.version), f"{stored.made:%Y-%m-%d %H:%M}", f"{stored.n_bytes:,}", *told, _some(stored.studies)]


def _some(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "-"


def read(prior: str, storage_url: str | None) -> Prior:
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


def as_text(prior: Prior) -> str:
    """What a prior's card says, in a few lines."""
    card = prior.card
    if "held_out" not in card:
        return "\n".join(f"{key}: {value}" for key, value in card.items()) or "no card"
    held, tasks = card["held_out"], card["tasks"]
    layers = [task["layers"] for task in tasks]
    made = (
        f"Made {card['made']} by version {card['version']} from {len(tasks)} tasks, "
        f"{sum(task['trials'] for task in tasks)} trials, {min(layers)} to {max(layers)} layers."
    )
    if held["gain"] is None:
        return f"{made}\nThe tasks held out are too short to say how well it transfers."
    gains = [task["gain"] for task in held["tasks"]]
    spread = f" ({min(gains):+.2f} to {max(gains):+.2f})" if len(gains) > 1 else ""
    return (
        f"{made}\nTasks held out: {len(gains)}; the rest of each predicted from its first {held['n_first']} trials, "
        f"rank correlation {held['with_prior']:.2f} with it, {held['without']:.2f} without; gain {held['gain']:+.2f}"
        f"{spread}."
    )


def learned_from(prior: Prior) -> list[list[str]]:
    """A row for each task on a prior's card, a head first; the gain is of those held out."""
    gains = {task["name"]: f"{task['gain']:+.2f}" for task in prior.card.get("held_out", {}).get("tasks", [])}
    rows = [[task["name"], str(task["layers"]), str(task["trials"])] for task in prior.card["tasks"]]
    return [["task", "layers", "trials", "gain, held out"], *([*row, gains.get(row[0], "-")] for row in rows)]


def prune(storage_url: str, keep: int, name: str | None = None) -> str:
    """Removes old versions that no study uses; says which. See ``PriorStore.prune``."""
    removed = PriorStore(storage_url).prune(keep, name, uses(open_storage(storage_url)))
    return f"Removed {', '.join(map(str, removed)) or 'nothing'}."


def collect(storage_url: str) -> str:
    """Removes what belongs to studies that are gone; says what. See ``PriorStore.collect``."""
    gone, versions = PriorStore(storage_url).collect(uses(open_storage(storage_url)))
    studies = sorted({use.study for use in gone})
    return (
        f"Forgot the uses of {len(studies)} deleted studies{': ' if studies else ''}{', '.join(studies)}. "
        f"Removed {', '.join(map(str, versions)) or 'no version'}."
    )
