"""Verification trials: configurations run again on seeds that the search did not use.

They are ordinary trials of the study whose user attribute ``rankadaptor:verify`` is the seed. The search ignores them:
scores of another seed have another common offset, so they are compared with scores of the same seed only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankadaptor_optuna.database.attributes import VERIFY_ATTR
from rankadaptor_optuna.sampling.trials import (
    constraints_of,
    has_failed,
    has_finite_values,
    planned_params,
    retried_numbers,
    verification_seed,
)
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.surrogate.grid import Array

_FIRST_SEED = 1_000_001  # far from the seeds that people give their studies; set by hand
Configuration = tuple[Any, ...]


def verification_seeds(n: int) -> list[int]:
    """Returns the first n verification seeds, the same in every study: a later verification extends an earlier one."""
    return [_FIRST_SEED + i for i in range(n)]


@dataclass(frozen=True)
class Confirmation:
    """Gain of a configuration over the uniform one, measured by verification trials.

    Attributes:
        gain: Mean difference to uniform on the same seeds, in score units, positive is better. It is biased upwards
            where the configuration was chosen among several by the same seeds.
        interval: Its 95% t interval over the seeds, with a Bonferroni correction for ``n_verified`` comparisons.
        n_seeds: Number of seeds on which both were run.
        n_verified: Number of configurations compared with uniform.
        alike: Whether the differences to uniform are equal on all seeds: no spread to compute an interval from.
    """

    gain: float
    interval: tuple[float, float]
    n_seeds: int
    n_verified: int
    alike: bool = False


class Verifications:
    """The verification trials of a study.

    Args:
        reading: A study with one objective.
        names: Parameters that identify a configuration, in order.

    Attributes:
        scores: Mean score of each verified configuration by seed, higher is better.
        failed: Configurations that failed in at least as many verification trials as have a score, see ``has_failed``.
        rejected: These, and configurations that broke a constraint in a verification trial.
    """

    def __init__(self, reading: StudyReading, names: Sequence[str]) -> None:
        self.scores: dict[Configuration, dict[int, float]] = {}
        self.rejected: set[Configuration] = set()
        self._study, self._names = reading.study, list(names)
        self._values: dict[Configuration, list[Any]] = {}
        self._pending: set[tuple[Configuration, int]] = set()
        found: dict[tuple[Configuration, int], list[float]] = {}
        failures: dict[Configuration, set[int]] = {}
        interrupted = set().union(*map(retried_numbers, reading.verification_trials))  # their worker was killed
        for trial in reading.verification_trials:
            params, seed = planned_params(trial), verification_seed(trial)
            if seed is None or not params.keys() >= set(self._names):
                continue
            key = self.configuration(params)
            if not trial.state.is_finished():
                self._pending.add((key, seed))
            elif has_finite_values(trial):
                found.setdefault((key, seed), []).append(reading.sign * trial.values[0])
            elif has_failed(trial) and trial.number not in interrupted:
                failures.setdefault(key, set()).add(seed)
            if any(value > 0 for value in constraints_of(trial).values()):
                self.rejected.add(key)
        for (key, seed), values in found.items():
            self.scores.setdefault(key, {})[seed] = float(np.mean(values))
        scored = {key: self.scores.get(key, {}) for key in failures}
        self.failed = {
            key for key, seeds in failures.items() if len(seeds - scored[key].keys()) >= max(1, len(scored[key]))
        }
        self.rejected |= self.failed

    def configuration(self, params: Mapping[str, Any]) -> Configuration:
        """Returns the values that identify a configuration."""
        values = [params[name] for name in self._names]
        key = tuple(value if isinstance(value, Hashable) else json.dumps(value) for value in values)
        self._values.setdefault(key, values)
        return key

    def params(self, key: Configuration) -> dict[str, Any]:
        """Returns the parameters of a configuration."""
        return dict(zip(self._names, self._values[key], strict=True))

    def enqueue(self, configurations: Iterable[Mapping[str, Any]], n_seeds: int) -> None:
        """Enqueues runs of configurations on the first seeds, unless they are waiting, running or done.

        Runs are ordered by seed, so that configurations can be compared early.
        """
        wanted = list(configurations)
        for seed in verification_seeds(n_seeds):
            for params in wanted:
                key = self.configuration(params)
                if (key, seed) in self._pending or seed in self.scores.get(key, {}):
                    continue
                self._study.enqueue_trial(dict(params), user_attrs={VERIFY_ATTR: seed})
                self._pending.add((key, seed))

    def differences(self, key: Configuration, reference: Configuration) -> list[float]:
        """Returns a configuration's score minus that of ``reference`` for each seed on which both were run."""
        ours, theirs = self.scores.get(key, {}), self.scores.get(reference, {})
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def contrasts(self, encode: Callable[[Configuration], Array], limit: float) -> tuple[Array, Array]:
        """Returns the scores without the seeds' common offsets, as observations of the performance model.

        The n scores of a seed become n - 1 orthonormal contrasts, sums with weights that add up to 0: their noise is
        independent, with the variance of a single score's.

        Args:
            encode: Returns the features of a configuration, (F,).
            limit: Largest distance of a score from its seed's median, to which scores further away (a recovery that
                diverged) are clipped.

        Returns:
            Features (m, F) and scores (m,), higher is better.
        """
        rows, values = [], []
        for seed in sorted({seed for by_seed in self.scores.values() for seed in by_seed}):
            keys = [key for key, by_seed in self.scores.items() if seed in by_seed]
            scores = np.asarray([self.scores[key][seed] for key in keys])
            scores = np.clip(scores - np.median(scores), -limit, limit)
            basis = np.linalg.qr(np.eye(len(keys)) - 1 / len(keys))[0][:, :-1].T
            rows.append(basis @ np.stack([encode(key) for key in keys]))
            values.append(basis @ scores)
        return np.concatenate(rows), np.concatenate(values)
