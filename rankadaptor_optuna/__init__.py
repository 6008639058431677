"""RankAdaptor for Optuna: find a LoRA rank for each layer of a pruned LLM.

The public names load on first use, so that importing the package pulls in neither torch nor transformers. Once it is
imported, `AutoModelForCausalLM.from_pretrained` opens pruned checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rankadaptor_optuna.pruning.auto_classes import register_when_imported

if TYPE_CHECKING:
    from rankadaptor_optuna.objective import RecoveryObjective
    from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
    from rankadaptor_optuna.sampling.trials import verification_seed
    from rankadaptor_optuna.space import RankSpace
    from rankadaptor_optuna.studies.convergence import StopWhenConverged
    from rankadaptor_optuna.studies.recommendation import recommend
    from rankadaptor_optuna.studies.sensitivity_note import note_sensitivity
    from rankadaptor_optuna.studies.storage import create_study
    from rankadaptor_optuna.surrogate.performance_model import PerformanceModel
    from rankadaptor_optuna.views.dashboard import publish_dashboard

__version__ = "0.1.0"

register_when_imported()

_HOMES = {
    "PerformanceModel": "surrogate.performance_model",
    "RankAdaptorSampler": "sampling.sampler",
    "RankSpace": "space",
    "RecoveryObjective": "objective",
    "StopWhenConverged": "studies.convergence",
    "create_study": "studies.storage",
    "note_sensitivity": "studies.sensitivity_note",
    "publish_dashboard": "views.dashboard",
    "recommend": "studies.recommendation",
    "verification_seed": "sampling.trials",
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
