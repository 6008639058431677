"""RankAdaptor for Optuna: find a LoRA rank for each layer of a pruned LLM.

The public names load on first use, so that importing the package pulls in neither torch nor transformers. Once it is
imported, `AutoModelForCausalLM.from_pretrained` opens pruned checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rankadaptor_optuna._auto import register_when_imported

if TYPE_CHECKING:
    from rankadaptor_optuna.convergence import StopWhenConverged
    from rankadaptor_optuna.dashboard import publish_dashboard
    from rankadaptor_optuna.history import verification_seed
    from rankadaptor_optuna.objective import RecoveryObjective, note_sensitivity
    from rankadaptor_optuna.recommendation import recommend
    from rankadaptor_optuna.sampler import RankAdaptorSampler
    from rankadaptor_optuna.space import RankSpace
    from rankadaptor_optuna.study import create_study
    from rankadaptor_optuna.surrogate.model import PerformanceModel

__version__ = "0.1.0"

register_when_imported()

_HOMES = {
    "PerformanceModel": "surrogate.model",
    "RankAdaptorSampler": "sampler",
    "RankSpace": "space",
    "RecoveryObjective": "objective",
    "StopWhenConverged": "convergence",
    "create_study": "study",
    "note_sensitivity": "objective",
    "publish_dashboard": "dashboard",
    "recommend": "recommendation",
    "verification_seed": "history",
}

__all__ = [
    "PerformanceModel",
    "RankAdaptorSampler",
    "RankSpace",
    "RecoveryObjective",
    "StopWhenConverged",
    "create_study",
    "note_sensitivity",
    "publish_dashboard",
    "recommend",
    "verification_seed",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
