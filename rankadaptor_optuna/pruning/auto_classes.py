"""Registers pruned checkpoints with transformers' Auto classes as soon as these are imported, and no earlier."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto.modeling_auto"
_REGISTERS = "rankadaptor_optuna.pruning.checkpoint"


class _ThenRegister(Loader):
    """Loads the Auto classes as usual, then registers the pruned classes."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
        self._loader.exec_module(module)
        with suppress(ImportError):  # an old transformers, which cannot prune, must still import
            import_module(_REGISTERS)


class _WhenImported(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


_FINDER = _WhenImported()


def register_when_imported() -> None:
    """Registers the pruned classes now if the Auto classes are imported, else as soon as they are."""
    if _AUTO in sys.modules:
        import_module(_REGISTERS)
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
