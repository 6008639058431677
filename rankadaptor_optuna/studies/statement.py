"""The statement of a recommendation: how far the data supports it, in a sentence or two."""

from __future__ import annotations

from collections.abc import Mapping

from rankadaptor_optuna.studies.verification import Confirmation
from rankadaptor_optuna.surrogate.grid import Array

_SMALL = 0.001  # interval below which four decimals say little; set by hand


def uniform_statement(uniform: Array, n_trials: int, n_verified: int, fixed: Mapping[int, int] | None = None) -> str:
    """Returns the statement where the uniform configuration, (L,), is recommended.

    Args:
        uniform: The uniform configuration, (L,).
        n_trials: Number of trials that the performance model learned from.
        n_verified: Number of configurations that were verified.
        fixed: Ranks of layers that are not searched.
    """
    verified = f" and {n_verified} configurations verified on fresh seeds" if n_verified else ""
    return f"Keep {_name(uniform, fixed)}: after {n_trials} trials{verified}, no other configuration is safely better."


def gain_statement(
    uniform: Array,
    n_trials: int,
    gain: float,
    interval: tuple[float, float],
    *,
    holds_on_own_seed: bool,
    confirmed: Confirmation | None,
    fixed: Mapping[int, int] | None = None,
) -> str:
    """Returns the statement where other ranks than the uniform configuration are recommended.

    Args:
        uniform: The uniform configuration, (L,).
        n_trials: Number of trials that the performance model learned from.
        gain: Predicted gain over uniform on fresh seeds, in score units.
        interval: Its central 95% interval.
        holds_on_own_seed: Whether the predicted gain on the search's own seed is positive with 97.5% confidence.
        confirmed: Measured gain; None without verification.
        fixed: Ranks of layers that are not searched.
    """
    if interval[0] > 0:
        support = "Supported by the data"
    elif confirmed is not None:
        support = "Not supported by the search alone"
    elif holds_on_own_seed:
        support = "Supported on the search's own seed only"
    else:
        support = "Not yet supported by the data"
    predicted = (
        f"{support}: predicted gain over {_name(uniform, fixed)} on fresh seeds {_with_interval(gain, interval)}"
    )
    return f"{predicted}, from {n_trials} trials.{_confirmation(confirmed)}"


def _confirmation(confirmed: Confirmation | None) -> str:
    if confirmed is None:
        return ""
    if confirmed.alike:
        seeds = f"{confirmed.n_seeds} fresh seeds"
        return f" Measured on {seeds}: a gain of {confirmed.gain:+.4f} on each, no spread to judge by."
    low, high = confirmed.interval
    verdict = "Confirmed" if low > 0 else "Worse than uniform" if high < 0 else "Not confirmed"
    measured = f"measured gain {_with_interval(confirmed.gain, confirmed.interval)}"
    said = f" {verdict} on {confirmed.n_seeds} fresh seeds: {measured}."
    if confirmed.n_verified > 1:
        said += f" The interval, not the gain, allows for the choice among {confirmed.n_verified} configurations."
    return said


def worse_than_none(predicted: float, unrecovered: float) -> str:
    """Returns the sentence to add where a recovery with the recommended ranks is worse than none."""
    return (
        f" But recovery made the model worse: predicted score {predicted:.4f}, without recovery {unrecovered:.4f}. "
        "Lower the learning rate, or train longer."
    )


def failures_statement(n_failed: int) -> str:
    """Returns the sentence to add where verified configurations failed on fresh seeds."""
    failed = "1 verified configuration" if n_failed == 1 else f"{n_failed} verified configurations"
    return f" {failed} failed on fresh seeds and cannot be recommended."


def _name(uniform: Array, fixed: Mapping[int, int] | None) -> str:
    name = f"uniform rank {uniform[0]:g}" if len(set(uniform)) == 1 else "the middle of each rank's range"
    by_rank: dict[int, list[str]] = {}
    for layer, rank in (fixed or {}).items():
        if rank != uniform[0]:
            by_rank.setdefault(rank, []).append(str(layer))
    others = "; ".join(f"rank {rank} in layers {', '.join(layers)}" for rank, layers in by_rank.items())
    return f"{name} in the searched layers ({others})" if others else name


def _with_interval(gain: float, interval: tuple[float, float]) -> str:
    low, high = interval
    is_small = 0 < max(abs(low), abs(high)) < _SMALL
    gain_text, low_text, high_text = (f"{x:+.2e}" if is_small else f"{x:+.4f}" for x in (gain, low, high))
    return f"{gain_text} (95% interval {low_text} to {high_text})"
