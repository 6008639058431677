"""Brings the content of files in earlier formats to the present content.

To change a format: raise its number where it is written, add a function that converts the number left behind, and keep
a small file of that number in ``tests/surrogate/data``, which a test opens.
"""

from __future__ import annotations

import json
from typing import Any

from rankadaptor_optuna.surrogate.features import N_INPUTS
from rankadaptor_optuna.surrogate.grid import Array


def prior_card(metadata: dict[str, str]) -> dict[str, Any]:
    """Returns the card of a prior of any format.

    Format 2 keeps the card as JSON. The first files of format 1 keep each of its entries as one of the metadata.
    """
    entries = {name: text for name, text in metadata.items() if name not in ("format", "card")}
    card = json.loads(metadata.get("card", "{}"))
    if not isinstance(card, dict):
        raise ValueError(f"its card must be an object, got {card!r:.80}")
    return {**entries, **card}


def without_sensitivity_input(tensors: dict[str, Array]) -> dict[str, Array]:
    """Returns a prior's tensors whose network has no input for the layer's sensitivity.

    The first files of format 2 hold a network with that input as its fourth. It was 0 where the sensitivity was
    unknown, so without it the network computes what it did there.
    """
    first = tensors["mlp.0.weight"]
    return tensors if first.ndim != 2 or len(first) != N_INPUTS + 1 else {**tensors, "mlp.0.weight": first[:N_INPUTS]}
