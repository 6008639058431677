"""Recipes in the formats of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT = 2
_EMBEDDED = "embedded: SmolLM2-135M-Instruct"


def upgraded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a recipe of any format in today's, without the number.

    Format 2 has a number, ``format``. Format 1 has none and the same keys, but for ``data.report_blocks`` and
    ``evaluation.report_tasks``. Before it, a quickstart had a format of its own, also without a number.

    Raises:
        ValueError: A newer version wrote the recipe.
    """
    settings = dict(recipe)
    number = settings.pop("format", FORMAT)
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(f"format: this version reads recipes up to format {FORMAT}, got {number!r}; upgrade it.")
    try:
        return _of_quickstart(settings) if "candidates" in settings else settings
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a quickstart's recipe of an earlier version: {error!r}.") from None


def _of_quickstart(old: Mapping[str, Any]) -> dict[str, Any]:
    """The data type is left out: it was always the default of the device."""
    data = old["data"]  # the text was always the embedded one
    return {
        "preset": "quickstart",
        "model": "embedded" if old["model"] == _EMBEDDED else old["model"],
        "seed": old["seed"],
        "pruning": old["pruning"],
        "space": {key: old[key] for key in ("candidates", "budget", "granularity") if key in old},
        "data": {"block_length": data["block"], "validation_blocks": data["validation_blocks"]},
        "training": old["training"],
    }
