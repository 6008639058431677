"""Structural pruning: remove heads, MLP channels, hidden channels or whole blocks from a language model.

The names load on first use, so importing the package loads neither torch nor transformers. Importing
`rankadaptor_optuna.pruning.checkpoint` registers the classes of pruned checkpoints with transformers' Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.checkpoint import LayerProfile, load_pruned, profile_of
    from rankadaptor_optuna.pruning.config import PruningConfig, llm_pruner_preset
    from rankadaptor_optuna.pruning.core import PrunedModel, prune

_HOMES = {
    "LayerProfile": "checkpoint",
    "PrunedModel": "core",
    "PruningConfig": "config",
    "llm_pruner_preset": "config",
    "load_pruned": "checkpoint",
    "profile_of": "checkpoint",
    "prune": "core",
}

__all__ = ["LayerProfile", "PrunedModel", "PruningConfig", "llm_pruner_preset", "load_pruned", "profile_of", "prune"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
