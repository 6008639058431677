"""Priors as tables and text."""

from __future__ import annotations

from rankadaptor_optuna.priors.store import PriorStore, StoredVersion
from rankadaptor_optuna.surrogate.prior import Prior


def versions_table(storage_url: str) -> list[list[str]]:
    """A row for each version, a head first; what is wrong with it where it cannot be read."""
    store = PriorStore(storage_url)
    head = ["prior", "made (UTC)", "bytes", "tasks", "gain", "used by"]
    return [head, *(_row(store, stored) for stored in store.versions())]


def _row(store: PriorStore, stored: StoredVersion) -> list[str]:
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


def card_text(prior: Prior) -> str:
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


def tasks_table(prior: Prior) -> list[list[str]]:
    """A row for each task on a prior's card, a head first; the gain is of those held out."""
    gains = {task["name"]: f"{task['gain']:+.2f}" for task in prior.card.get("held_out", {}).get("tasks", [])}
    rows = [[task["name"], str(task["layers"]), str(task["trials"])] for task in prior.card["tasks"]]
    return [["task", "layers", "trials", "gain, held out"], *([*row, gains.get(row[0], "-")] for row in rows)]
