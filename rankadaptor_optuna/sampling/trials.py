"""Facts of a single trial: its ranks, its verification seed, its constraints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optuna.trial import BaseTrial, FrozenTrial, TrialState

from rankadaptor_optuna.database.attributes import proposal_of, seed_of

_HUGE = 1e150  # squares of larger numbers overflow


def verification_seed(trial: BaseTrial) -> int | None:
    """Returns the seed of a verification trial; None for an ordinary trial, which takes the study's own seed.

    ``RecoveryObjective`` follows it. An objective of your own follows it by drawing everything random from it::

        seed = verification_seed(trial)
        return train_and_score(ranks, seed=0 if seed is None else seed)
    """
    return seed_of(trial.user_attrs)


def planned_params(trial: FrozenTrial) -> dict[str, Any]:
    """Returns a trial's parameters, with those that ``enqueue_trial`` fixed and the trial has not taken yet."""
    fixed = trial.system_attrs.get("fixed_params")
    return {**(fixed if isinstance(fixed, dict) else {}), **trial.params}


def announced_ranks(trial: FrozenTrial, names: Sequence[str]) -> tuple[int, ...] | None:
    """Returns a trial's ranks in the order of ``names``.

    Where some of its parameters are not stored yet, returns the ranks that its worker announced for it, and None
    without an announcement of that length.
    """
    ranks: list[Any] = [trial.params.get(name) for name in names]
    if None in ranks:
        return proposal_of(trial.system_attrs, len(names)) if names else None
    return tuple(ranks) if names else None


def constraints_of(trial: FrozenTrial) -> dict[str, float]:
    """Returns the constraints that a trial was given, by name; a constraint is kept where it is at most 0."""
    if hasattr(trial, "constraints"):
        return dict(trial.constraints)
    return {str(i): c for i, c in enumerate(trial.system_attrs.get("constraints") or ())}  # Optuna 4


def retried_numbers(trial: FrozenTrial) -> set[int]:
    """Returns the numbers of the failed trials that this trial runs again, as their worker was killed."""
    return set(trial.system_attrs.get("retry_history", ()))  # of Optuna's RetryHeartbeatStaleTrialCallback


def has_failed(trial: FrozenTrial) -> bool:
    """Returns whether a finished trial failed, has no finite value, or was pruned without a finite report."""
    if trial.state is TrialState.PRUNED:
        reports = trial.intermediate_values
        return not reports or not math.isfinite(reports[max(reports)])
    return not has_finite_values(trial)


def has_finite_values(trial: FrozenTrial) -> bool:
    """Returns whether a trial is complete and all its objective values are finite (and leave room for arithmetic)."""
    return trial.state is TrialState.COMPLETE and all(abs(value) < _HUGE for value in trial.values)
