"""Checks that settings which are declared as numbers are numbers."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from typing import Any

_KINDS = {"int": (Integral, "an integer"), "float": (Real, "a number")}


def check_numbers(settings: Any) -> None:  # noqa: ANN401
    """Checks the fields of a dataclass that are declared as ``int`` or ``float``, or as one of these or None.

    Raises:
        ValueError: A value is of another type, such as text; the message names it.
    """
    for field in fields(settings):
        declared, value = str(field.type), getattr(settings, field.name)
        kind = _KINDS.get(declared.removesuffix(" | None"))
        if kind is None or (value is None and declared.endswith(" | None")):
            continue
        if isinstance(value, bool) or not isinstance(value, kind[0]):
            raise ValueError(f"{field.name} must be {kind[1]}, got {value!r}.")


def check_seed(seed: Any) -> None:  # noqa: ANN401
    """Checks a seed.

    Raises:
        ValueError: It is no integer of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}.")
