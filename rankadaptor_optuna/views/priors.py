"""Priors as tables and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.attributes import is_number
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
        cells = [str(len(card.get("tasks", []))), "-"]
        if is_complete(card) and card["held_out"]["gain"] is not None:
            cells[1] = f"{card['held_out']['gain']:+.2f}"
    except (TypeError, ValueError):  # tasks may be anything
        cells = ["unreadable", "-"]
    made, size = f"{stored.made:%Y-%m-%d %H:%M}", as_count(stored.n_bytes)
    return [str(stored.version), made, size, *cells, _shortened(stored.studies)]


def _shortened(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "-"


def is_complete(card: Mapping[str, Any]) -> bool:
    """Returns whether a card, which anyone may have written, has all entries that ``meta_train`` writes."""
    tasks, held = card.get("tasks"), card.get("held_out")
    if not {"made", "version"} <= card.keys() or not tasks or not isinstance(held, dict):
        return False
    measures = ("with_prior", "without", "gain")
    known = all(is_number(held.get(key)) for key in measures) or all(held.get(key) is None for key in measures)
    known = known and is_number(held.get("n_first"))
    return known and _are_rows(tasks, "layers", "trials") and _are_rows(held.get("tasks"), *measures)


def _are_rows(rows: Any, *numbers: str) -> bool:  # noqa: ANN401
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        return False
    return all(is_number(row.get(key)) for row in rows for key in numbers)


def card_text(prior: Prior) -> str:
    """Returns a prior's card in a few lines."""
    card = prior.card
    if not is_complete(card):
        return "\n".join(f"{one_line(key)}: {one_line(value):.500}" for key, value in card.items()) or "no card"
    held, tasks = card["held_out"], card["tasks"]
    layers = [task["layers"] for task in tasks]
    made = (
        f"Made {one_line(card['made'])} by version {one_line(card['version'])} from {len(tasks)} tasks, "
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
    """Returns a row per task of a prior's complete card; held-out tasks have a gain."""
    gains = {str(task["name"]): f"{task['gain']:+.2f}" for task in prior.card["held_out"]["tasks"]}
    rows = [[str(task["name"]), str(task["layers"]), str(task["trials"])] for task in prior.card["tasks"]]
    return [["task", "layers", "trials", "gain, held out"], *([*row, gains.get(row[0], "-")] for row in rows)]


def removed_text(versions: Sequence[Version]) -> str:
    """Returns which versions were removed."""
    return f"Removed {', '.join(map(str, versions)) or 'nothing'}."


def collected_text(collected: Collected) -> str:
    """Returns which deleted studies' uses were forgotten, and which versions were removed."""
    names = f": {', '.join(map(one_line, collected.studies))}" if collected.studies else ""
    return f"Forgot the uses of {len(collected.studies)} deleted studies{names}. {removed_text(collected.versions)}"
