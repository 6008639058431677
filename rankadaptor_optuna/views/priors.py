"""Priors as tables and text."""

from __future__ import annotations

from collections.abc import Sequence

from rankadaptor_optuna.jobs.results import Collected
from rankadaptor_optuna.priors.store import PriorStore, StoredVersion, Version
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.views.style import as_count
from rankadaptor_optuna.views.tables import Table


def versions_table(storage_url: str) -> Table:
    """Returns a row per version of a database's priors."""
    store = PriorStore(storage_url)
    head = ["prior", "made (UTC)", "bytes", "tasks", "gain", "used by"]
    return [head, *(_version_row(store, stored) for stored in store.versions())]


def _version_row(store: PriorStore, stored: StoredVersion) -> list[str]:
    try:
        card = store.load(*stored.version).card
        gain = card.get("held_out", {}).get("gain")
        cells = [str(len(card.get("tasks", []))), "-" if gain is None else f"{gain:+.2f}"]
    except ValueError:
        cells = ["unreadable", "-"]
    made, size = f"{stored.made:%Y-%m-%d %H:%M}", as_count(stored.n_bytes)
    return [str(stored.version), made, size, *cells, _shortened(stored.studies)]


def _shortened(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "-"


def card_text(prior: Prior) -> str:
    """Returns a prior's card in a few lines."""
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
        return f"{made}\nNo measure of its transfer: the held-out tasks have too few trials."
    gains = [task["gain"] for task in held["tasks"]]
    spread = f" ({min(gains):+.2f} to {max(gains):+.2f})" if len(gains) > 1 else ""
    return (
        f"{made}\nRank correlation on held-out tasks ({len(gains)}), predicted from their first {held['n_first']} "
        f"trials: {held['with_prior']:.2f} with the prior, {held['without']:.2f} without; "
        f"gain {held['gain']:+.2f}{spread}."
    )


def tasks_table(prior: Prior) -> Table:
    """Returns a row per task of a prior's card; held-out tasks have a gain."""
    gains = {task["name"]: f"{task['gain']:+.2f}" for task in prior.card.get("held_out", {}).get("tasks", [])}
    rows = [[task["name"], str(task["layers"]), str(task["trials"])] for task in prior.card["tasks"]]
    return [["task", "layers", "trials", "gain, held out"], *([*row, gains.get(row[0], "-")] for row in rows)]


def removed_text(versions: Sequence[Version]) -> str:
    """Returns which versions were removed."""
    return f"Removed {', '.join(map(str, versions)) or 'nothing'}."


def collected_text(collected: Collected) -> str:
    """Returns which deleted studies' uses were forgotten, and which versions were removed."""
    names = f": {', '.join(collected.studies)}" if collected.studies else ""
    return f"Forgot the uses of {len(collected.studies)} deleted studies{names}. {removed_text(collected.versions)}"
