"""Keys of the attributes that this package stores on studies and trials, and checked reading of their values.

Anyone with access to the storage may write any value there. An unusable value is ignored with a warning, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna

from rankadaptor_optuna.checks.plain_text import one_line

# user attributes of a study
SPACE_ATTR = "rankadaptor:space"  # the rank space, as RankSpace.to_dict returns it
RANKS_ATTR = "rankadaptor:ranks"  # templates of the rank parameters' names, where there is no space
PRIOR_ATTR = "rankadaptor:prior"  # identity of the prior that the study began with
RECIPE_ATTR = "rankadaptor:recipe"  # settings of its trials
DIGESTS_ATTR = "rankadaptor:digests"  # digests of the data of its trials
UNRECOVERED_ATTR = "rankadaptor:unrecovered"  # score of the pruned model without recovery
SENSITIVITY_ATTR = "rankadaptor:sensitivity"  # sensitivity of the loss to each layer's adapter, by rank parameter
TRIALS_ATTR = "rankadaptor:trials"  # number of finished trials to reach
CONVERGED_ATTR = "rankadaptor:converged"  # statement of StopWhenConverged

# user attributes of a trial
VERIFY_ATTR = "rankadaptor:verify"  # seed of a verification trial
ITEMS_ATTR = "rankadaptor:items"  # True where the steps of the reports are items of an evaluation

# system attributes of a trial
PROPOSAL_ATTR = "rankadaptor:proposal"  # announced ranks, in the grid's order

_MAX_SEED = 2**63 - 1  # of torch.manual_seed
_LARGEST = 1e100  # sensitivity, of which the performance model takes powers; set by hand
_logger = optuna.logging.get_logger(f"optuna.{__name__}")
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Logs a warning, unless it was logged already."""
    if message not in _warned:
        _warned.add(message)
        _logger.warning(message)


def unusable(key: str, value: object, expected: str) -> str:
    """Returns a message in one line: an attribute has a value that is not the expected one."""
    return f"attribute {key!r} must be {expected}, got {one_line(repr(value)):.80}"


def sensitivity_of(user_attrs: Mapping[str, Any]) -> dict[str, float]:
    """Returns the sensitivities stored with a study, by rank parameter; empty where there are none."""
    value = user_attrs.get(SENSITIVITY_ATTR, {})
    if isinstance(value, dict) and all(is_number(each) and abs(each) <= _LARGEST for each in value.values()):
        return {name: float(each) for name, each in value.items()}
    warn_once(f"{unusable(SENSITIVITY_ATTR, value, 'an object of numbers')}: ignored.")
    return {}


def unrecovered_of(user_attrs: Mapping[str, Any]) -> float | None:
    """Returns the score without recovery stored with a study; None where there is none."""
    value = user_attrs.get(UNRECOVERED_ATTR)
    if value is None or is_number(value):
        return value
    warn_once(f"{unusable(UNRECOVERED_ATTR, value, 'a number')}: ignored.")
    return None


def ranks_of(user_attrs: Mapping[str, Any]) -> list[str] | None:
    """Returns the templates of the rank parameters' names stored with a study; None where there are none."""
    value = user_attrs.get(RANKS_ATTR)
    if value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        return value
    warn_once(f"{unusable(RANKS_ATTR, value, 'a list of texts')}: ignored.")
    return None


def converged_of(user_attrs: Mapping[str, Any]) -> str | None:
    """Returns the statement of ``StopWhenConverged`` stored with a study, in one line."""
    value = user_attrs.get(CONVERGED_ATTR)
    return one_line(value) if isinstance(value, str) else None


def recipe_of(user_attrs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the recipe stored with a study; None where there is none.

    Raises:
        ValueError: The attribute is not an object.
    """
    value = user_attrs.get(RECIPE_ATTR)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{unusable(RECIPE_ATTR, value, 'an object of settings')}.")
    return value


def digests_of(user_attrs: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digests of the data of a study's trials; empty where there are none."""
    value = user_attrs.get(DIGESTS_ATTR, {})
    if isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
        return value
    warn_once(f"{unusable(DIGESTS_ATTR, value, 'an object of texts')}: ignored.")
    return {}


def identity_of(user_attrs: Mapping[str, Any]) -> str | None:
    """Returns the identity of the prior that a study began with, None where it stores none."""
    value = user_attrs.get(PRIOR_ATTR)
    return None if value is None else str(value)


def trials_of(user_attrs: Mapping[str, Any]) -> int | None:
    """Returns the number of trials that the workers of a study are to reach; None where it stores none."""
    value = user_attrs.get(TRIALS_ATTR)
    if value is None or (is_number(value) and value == int(value) and value >= 1):
        return None if value is None else int(value)
    warn_once(f"{unusable(TRIALS_ATTR, value, 'a number from 1 on')}: ignored.")
    return None


def seed_of(user_attrs: Mapping[str, Any]) -> int | None:
    """Returns the seed of a verification trial; None for an ordinary trial."""
    value = user_attrs.get(VERIFY_ATTR)
    if value is None or (is_number(value) and value == int(value) and 0 <= value <= _MAX_SEED):
        return None if value is None else int(value)
    warn_once(f"{unusable(VERIFY_ATTR, value, 'a seed from 0 on')}: the trial counts as an ordinary one.")
    return None


def proposal_of(system_attrs: Mapping[str, Any], n_ranks: int) -> tuple[int, ...] | None:
    """Returns the ranks announced for a trial; None without an announcement of that many ranks."""
    value = system_attrs.get(PROPOSAL_ATTR)
    if not isinstance(value, list) or len(value) != n_ranks or not all(is_number(rank) for rank in value):
        return None
    return tuple(value)


def is_number(value: object) -> bool:
    """Returns whether a value from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
