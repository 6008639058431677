"""Structural pruning: cut heads, MLP channels, hidden channels or whole blocks out of a language model.

The names load on first use, so that importing the package pulls in neither torch nor transformers. Importing
`rankadaptor_optuna.pruning.checkpoint` makes pruned checkpoints known to transformers' Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.checkpoint import LayerProfile, load_pruned, profile_of
    from rankadaptor_optuna.pruning.core import PrunedModel, llm_pruner_preset, prune

_HOMES = {
    "LayerProfile": "checkpoint",
    "PrunedModel": "core",
    "llm_pruner_preset": "core",
    "load_pruned": "checkpoint",
    "profile_of": "checkpoint",
    "prune": "core",
}

__all__ = ["LayerProfile", "PrunedModel", "llm_pruner_preset", "load_pruned", "profile_of", "prune"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
