"""note_sensitivity: stores with a study how sensitive the loss is to each layer's adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from optuna.trial import Trial

from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.sensitivity import sensitivities
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.space import RankSpace

if TYPE_CHECKING:
    import torch


def note_sensitivity(
    trial: Trial,
    space: RankSpace,
    model: Any,  # noqa: ANN401
    data: torch.Tensor | Examples,
) -> None:
    """Stores with the study how sensitive the loss is to each layer, where the sampler expects rank to be worth most.

    ``RecoveryObjective`` calls it itself. An objective of your own calls it at the end of each trial: it measures once
    per study, in a trial of uniform ranks (the first that ``RankAdaptorSampler`` proposes), and else does nothing.

    Args:
        trial: The trial, after ``space.suggest(trial)``.
        space: The rank space.
        model: The PEFT model trained with the trial's ranks.
        data: The data that the trial is scored on: blocks of token ids, (n, length), or examples.
    """
    study = getattr(trial, "study", None)  # a FixedTrial has none
    uniform = space.uniform()
    is_uniform = bool(uniform.adapted) and space.to_params(uniform).items() <= trial.params.items()
    if study is None or not is_uniform or verification_seed(trial) is not None or SENSITIVITY_ATTR in study.user_attrs:
        return
    measured = space.by_module(sensitivities(model, data))
    if not all(map(math.isfinite, measured.values())):  # the recovery diverged; another uniform trial may not
        return
    study.set_user_attr(SENSITIVITY_ATTR, {space.name(module): value for module, value in measured.items()})
