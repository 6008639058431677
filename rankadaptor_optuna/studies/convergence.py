"""StopWhenConverged: ends a study when further search has little left to find (the paper's convergence phase)."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial

from rankadaptor_optuna.attributes import CONVERGED_ATTR
from rankadaptor_optuna.priors.choice import PriorLike
from rankadaptor_optuna.sampling.history import verification_seed
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.reading import finished_trials
from rankadaptor_optuna.studies.recommendation import Findings

_N_POINTS = 256
_logger = optuna.logging.get_logger(f"optuna.{__name__}")  # below Optuna's own logger, so that its verbosity counts


class StopWhenConverged:
    """A callback for ``study.optimize`` that stops when the expected remaining gain is well below a score's noise.

    The remaining gain is what stopping now is expected to miss: over Thompson draws, the mean of a draw's best total
    within the budget less the draw's value of the configuration that the posterior mean prefers. It says what it
    found in Optuna's log and in the study's user attribute ``rankadaptor:converged``.

    It keeps no state: any worker on the study comes to the same decision from the same trials. Trials that verify
    a recommendation are let through.

    Args:
        min_trials: Finished trials before which it does not stop.
        patience: At so many trials in a row the remaining gain must be below the limit.
        tolerance: The limit as a multiple of the noise.
        n_draws: Thompson draws.
        space: See ``recommend``.
        prior: See ``recommend``.

    Raises:
        ValueError: An argument is out of range; when called, the study has several objectives or its finished
            trials have no rank parameters.
    """

    def __init__(
        self,
        *,
        min_trials: int = 20,
        patience: int = 3,
        tolerance: float = 0.5,
        n_draws: int = 32,
        space: RankSpace | None = None,
        prior: PriorLike = "pretrained",
    ) -> None:
        for name, value in (("min_trials", min_trials), ("patience", patience), ("n_draws", n_draws)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {tolerance}.")
        self._min_trials, self._patience, self._n_draws = min_trials, patience, n_draws
        self._tolerance, self._space, self._prior = tolerance, space, prior

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Stops the study where it has converged."""
        if verification_seed(trial) is not None:
            return
        if len(study.directions) == 1 and not finished_trials(study, self._space):
            return
        found = Findings(study, self._space, self._prior)
        n = len(found.data.trials)
        if n < self._min_trials:
            return
        for fewer in range(max(1, n - self._patience + 1), n + 1):  # the latest last: the statement is about it
            gain = remaining_gain(found, fewer, self._n_draws)
            if gain >= self._tolerance * found.model.noise:
                return
        limit = f"{self._tolerance:g} times a score's noise of {found.model.noise:.2g}"
        statement = f"Converged after {n} trials: the expected remaining gain, {gain:.2g}, is below {limit}."
        study.set_user_attr(CONVERGED_ATTR, statement)
        _logger.info(statement)
        study.stop()


def remaining_gain(found: Findings, n: int, n_draws: int) -> float:
    """What stopping after the first ``n`` trials is expected to miss, in score units; fits the model to these.

    Where there are constraints, draws are penalised as the posterior mean is, which bounds the gain from above.
    """
    found.learn_from(n)
    model, rng = found.model, np.random.default_rng(n)
    mean = model.mean()
    penalised, choice, point = found.best(mean)
    penalty = penalised.plus(mean, -1)
    layers = np.arange(len(choice))
    points = np.concatenate([point[None], found.points, found.encoding.random_points(_N_POINTS, rng)])
    total = 0.0
    for _ in range(n_draws):
        draw = model.sample(rng).plus(penalty, 1)
        of_points = draw.of_ordinary(points)
        best = draw.table[layers, found.allocations.best(draw.table)].sum() + of_points.max()
        total += best - draw.table[layers, choice].sum() - of_points[0]
    return model.spread * total / n_draws
