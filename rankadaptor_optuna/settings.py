"""Nested dataclasses of settings, from the nested values of a file; whatever does not fit is named."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def changed(base: T, values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass with some fields changed, nested ones in part.

    Args:
        base: What is not named stays as it is here.
        values: As TOML or JSON has them; lists become tuples.
        path: Where ``base`` stands in a larger one, for messages: ``"training."``.

    Raises:
        ValueError: A key is unknown or its value impossible; the message names it.
    """
    hints = typing.get_type_hints(type(base))
    known = [f.name for f in fields(base)]  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}{name}: no such setting; there are {', '.join(known)}.")
        old = getattr(base, name)
        if is_dataclass(old) and not isinstance(old, type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}{name}: expected a table of settings, got {value!r}.")
            changes[name] = changed(old, value, f"{path}{name}.")
            continue
        changes[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(changes[name], hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            raise ValueError(f"{path}{name}: expected {wanted.replace('typing.', '')}, got {value!r}.")
    try:
        return replace(base, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def _fits(value: Any, hint: Any) -> bool:  # noqa: ANN401
    """Whether a value is of an annotated type; an integer is a float too, a boolean neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
