"""StopWhenConverged: ends a study when further search is expected to gain little (the paper's convergence phase)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial

from rankadaptor_optuna.database.attributes import CONVERGED_ATTR
from rankadaptor_optuna.priors.choice import PriorLike
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading

_N_RANDOM = 256  # random points of the ordinary parameters that a draw's optimum is sought among; set by hand
_logger = optuna.logging.get_logger(f"optuna.{__name__}")  # below Optuna's own logger, to follow its verbosity


class StopWhenConverged:
    """A callback for ``study.optimize`` that stops when the expected remaining gain is well below a score's noise.

    The remaining gain is the expected loss of stopping now: the mean over Thompson draws of a draw's best value within
    the budget minus its value of the configuration that the posterior mean prefers. Its statement goes to Optuna's log
    and to the study's user attribute ``rankadaptor:converged``.

    It keeps no state beyond a warning given: any worker on the study comes to the same decision from the same trials.
    Verification trials do not stop the study, nor do trials without ranks, about which it warns once.

    Args:
        min_trials: Number of trials with a value below which it does not stop.
        patience: Number of latest trials after each of which the remaining gain must be below the limit.
        tolerance: The limit as a multiple of the noise.
        n_draws: Number of Thompson draws.
        space: The rank space, see ``recommend``.
        ranks: Templates of the rank parameters' names, see ``recommend``.
        prior: The performance model's prior, see ``recommend``.

    Raises:
        ValueError: An argument is out of range; when called, the study has several objectives.
    """

    def __init__(
        self,
        *,
        min_trials: int = 20,
        patience: int = 3,
        tolerance: float = 0.5,
        n_draws: int = 32,
        space: RankSpace | None = None,
        ranks: str | Sequence[str] | None = None,
        prior: PriorLike = "pretrained",
    ) -> None:
        for name, value in (("min_trials", min_trials), ("patience", patience), ("n_draws", n_draws)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {tolerance}.")
        self._min_trials, self._patience, self._n_draws = min_trials, patience, n_draws
        self._has_warned = False
        self._tolerance, self._space, self._ranks, self._prior = tolerance, space, ranks, prior

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Stops the study where it has converged."""
        if verification_seed(trial) is not None:
            return
        reading = StudyReading(study, self._space, self._ranks)
        if len(study.directions) == 1 and not (reading.finished_trials and reading.rank_names):
            if reading.finished_trials and not self._has_warned:
                self._has_warned = True
                _logger.warning(
                    "StopWhenConverged does not stop the study yet: no completed trial has rank parameters."
                )
            return
        fitted = FittedStudy(reading, self._prior)
        n = len(fitted.observations.trials)
        if n < self._min_trials:
            return
        for fewer in range(max(1, n - self._patience + 1), n + 1):  # ends with n, which the statement is about
            gain = remaining_gain(fitted, fewer, self._n_draws)
            if gain >= self._tolerance * fitted.model.noise:
                return
        limit = f"{self._tolerance:g} times a score's noise of {fitted.model.noise:.2g}"
        statement = f"Converged after {n} trials: the expected remaining gain, {gain:.2g}, is below {limit}."
        study.set_user_attr(CONVERGED_ATTR, statement)
        _logger.info(statement)
        study.stop()


def remaining_gain(fitted: FittedStudy, n: int, n_draws: int) -> float:
    """Returns the expected loss of stopping after the first ``n`` observations, in score units; fits the model to them.

    With constraints, draws are penalised as the posterior mean is, which gives an upper bound.
    """
    fitted.fit_first(n)
    model, rng = fitted.model, np.random.default_rng(n)
    mean = model.mean()
    penalised, choice, point = fitted.best(mean)
    penalty = penalised.plus(mean, -1)
    layers = np.arange(len(choice))
    points = np.concatenate([point[None], fitted.points, fitted.encoding.random_points(_N_RANDOM, rng)])
    total = 0.0
    for _ in range(n_draws):
        draw = model.sample(rng).plus(penalty, 1)
        of_points = draw.of_ordinary(points)
        best = draw.table[layers, fitted.allocations.best(draw.table)].sum() + of_points.max()
        total += best - draw.table[layers, choice].sum() - of_points[0]
    return model.spread * total / n_draws
