"""Verification trials: a configuration once more, on a seed that the search did not use.

They are ordinary trials of the study that carry ``rankadaptor:verify``, the seed, as a user attribute. The search
leaves them alone: scores of another seed have another common offset, so they may be compared with each other only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from rankadaptor_optuna.attributes import VERIFY_ATTR
from rankadaptor_optuna.sampling.history import constraints_of, verification_seed
from rankadaptor_optuna.surrogate.grid import Array

_FIRST_SEED = 1_000_001  # far from the seeds that people give their studies
Configuration = tuple[Any, ...]


def verification_seeds(n: int) -> list[int]:
    """The first n seeds, the same in every study, so that a later verification is on the seeds of the earlier ones."""
    return [_FIRST_SEED + i for i in range(n)]


@dataclass(frozen=True)
class Confirmation:
    """What verification trials say of a configuration against the uniform one.

    Attributes:
        gain: Mean difference to uniform on the same seeds, in score units, positive is better. As that of one chosen
            among several by the same seeds it is on average too high.
        interval: Its 95% t interval over the seeds, widened (Bonferroni) for having chosen among ``n_verified``.
        n_seeds: Seeds on which both were run.
        n_verified: Configurations with such a difference.
    """

    gain: float
    interval: tuple[float, float]
    n_seeds: int
    n_verified: int


class Verifications:
    """A study's verification trials.

    Args:
        study: A study with one objective.
        names: Parameters that make a configuration, in order.

    Attributes:
        scores: Mean score of each verified configuration by seed, higher is better.
        infeasible: Configurations that broke a constraint.
    """

    def __init__(self, study: Study, names: Sequence[str]) -> None:
        self.scores: dict[Configuration, dict[int, float]] = {}
        self.infeasible: set[Configuration] = set()
        self._study, self._names = study, list(names)
        self._pending: set[tuple[Configuration, int]] = set()
        sign = 1 if study.direction is StudyDirection.MAXIMIZE else -1
        found: dict[tuple[Configuration, int], list[float]] = {}
        for trial in study.get_trials(deepcopy=False):
            params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if (seed := verification_seed(trial)) is None or not params.keys() >= set(self._names):
                continue
            key = self.configuration(params)
            if not trial.state.is_finished():
                self._pending.add((key, seed))
            elif trial.state is TrialState.COMPLETE and math.isfinite(trial.values[0]):
                found.setdefault((key, seed), []).append(sign * trial.values[0])
            if any(value > 0 for value in constraints_of(trial).values()):
                self.infeasible.add(key)
        for (key, seed), values in found.items():
            self.scores.setdefault(key, {})[seed] = float(np.mean(values))

    def configuration(self, params: Mapping[str, Any]) -> Configuration:
        """What tells one configuration from another."""
        return tuple(params[name] for name in self._names)

    def params(self, key: Configuration) -> dict[str, Any]:
        """The parameters of a configuration."""
        return dict(zip(self._names, key, strict=True))

    def enqueue(self, configurations: Iterable[Mapping[str, Any]], n_seeds: int) -> None:
        """Adds what is neither waiting, running nor done, seed by seed, so that pairs are complete early."""
        wanted = list(configurations)
        for seed in verification_seeds(n_seeds):
            for params in wanted:
                key = self.configuration(params)
                if (key, seed) in self._pending or seed in self.scores.get(key, {}):
                    continue
                self._study.enqueue_trial(dict(params), user_attrs={VERIFY_ATTR: seed})
                self._pending.add((key, seed))

    def differences(self, key: Configuration, reference: Configuration) -> list[float]:
        """How much better a configuration was than another on each seed that both were run on."""
        ours, theirs = self.scores.get(key, {}), self.scores.get(reference, {})
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def contrasts(self, encode: Callable[[Configuration], Array], limit: float) -> tuple[Array, Array]:
        """What the seeds' scores say without their common offset: features (m, F) and scores (m,), higher is better.

        A seed's n scores become n - 1 orthonormal contrasts, whose noise is independent again and as large as a
        single score's. Scores further than ``limit`` from their seed's median (a recovery that diverged) are pulled in.
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
