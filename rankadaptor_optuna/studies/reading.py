"""Read a study: its rank space, its rank parameters, its finished trials."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.attributes import SPACE_ATTR
from rankadaptor_optuna.sampling.encoding import Encoding, rank_parameters
from rankadaptor_optuna.sampling.history import History, verification_seed
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.surrogate.grid import RankGrid


def study_space(study: Study) -> RankSpace | None:
    """The rank space of a study: its sampler's, else the one stored with it."""
    sampler = getattr(study, "sampler", None)
    if isinstance(sampler, RankAdaptorSampler) and sampler.space is not None:
        return sampler.space
    stored = study.user_attrs.get(SPACE_ATTR)
    return None if stored is None else RankSpace.from_dict(stored)


def study_ranks(study: Study, space: RankSpace | None = None) -> dict[str, Any]:
    """The study's rank parameters in depth order, ``{parameter name: layer index}`` (or sublayer)."""
    space = space or study_space(study)
    if space is not None:
        return space.names
    history = History(study)
    history.refresh()
    return rank_parameters(history.searched)


def study_encoding(study: Study, history: History, space: RankSpace | None = None) -> Encoding:
    """How the study's trials become ranks and points, by its space or else by their names; ``history`` is read."""
    space = space or study_space(study)
    if space is None:
        return Encoding(history.searched, sensitivity=history.sensitivity)
    known = {**history.searched, **space.distributions()}
    return Encoding(known, RankGrid.from_space(space), list(space.distributions()), history.sensitivity)


def finished_trials(study: Study, space: RankSpace | None = None) -> list[FrozenTrial]:
    """Completed trials of the search with a finite score that carry every rank parameter."""
    names = study_ranks(study, space)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        t
        for t in complete
        if np.isfinite(t.values).all() and names.keys() <= t.params.keys() and verification_seed(t) is None
    ]


def uniform_trials(study: Study) -> list[FrozenTrial]:
    """Finished trials of the uniform configuration: the study's own LoRA reference; none where no space is known."""
    space = study_space(study)
    if space is None:
        return []
    uniform = space.to_params(space.uniform())
    return [t for t in finished_trials(study) if uniform.items() <= t.params.items()]
