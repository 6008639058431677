"""Parameters that are not searched with the ranks: left to Optuna's TPE, made anew for each trial, so without state."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial


def tpe(rng: np.random.Generator) -> TPESampler:
    """Returns a TPE sampler that models together the parameters that occur together, seeded by a generator."""
    seed = int(rng.integers(2**32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of group
        return TPESampler(seed=seed, multivariate=True, group=True)


def remaining_space(study: Study, trial: FrozenTrial, searched: Collection[str]) -> dict[str, BaseDistribution]:
    """Returns the parameters of a study's trials but for those that are searched with the ranks."""
    space = tpe(np.random.default_rng(0)).infer_relative_search_space(study, trial)
    return {name: distribution for name, distribution in space.items() if name not in searched}


def sample_remainder(
    study: Study, trial: FrozenTrial, space: Mapping[str, BaseDistribution], rng: np.random.Generator
) -> dict[str, Any]:
    """Returns values of all parameters of a part of ``remaining_space``."""
    sampler = tpe(rng)
    sampler.infer_relative_search_space(study, trial)  # it keeps the groups
    params = sampler.sample_relative(study, trial, dict(space))
    for name, distribution in space.items():  # in TPE's first trials
        if name not in params:
            params[name] = sampler.sample_independent(study, trial, name, distribution)
    return params
