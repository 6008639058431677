"""FittedStudy: a study's performance model, fitted to its search, and the configurations it expects to be good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from optuna.trial import TrialState

from rankadaptor_optuna.priors.choice import PriorChoice, PriorLike
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.space import BUDGET
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.verification import Verifications
from rankadaptor_optuna.surrogate.allocations import Allocations, Points, keeps, within_constraints
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.features import ordinary_features
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.knapsack import Choice

_FRANK_WOLFE_STEPS = 16  # set by hand
# Highest probability of failing of a recommendation, by the mode of the model of failures. Where the probability that
# allows for an uncertain model exceeds the first of them, the next one is tried. Set by hand.
_RISKS = (0.2, 0.1, 0.03, 0.01)
_SAME_POINT = 1e-9  # distance in the unit cube that is rounding; set by hand
_ROUNDING = 0.01  # difference of the scores of equal trials, in their standard deviations, that is not noise; by hand


class FittedStudy:
    """The performance model of a study, fitted to the trials of its search.

    Args:
        reading: The study.
        prior: The performance model's prior, see ``PriorChoice``. A study that began with a prior keeps it; its
            ``RankAdaptorSampler``, where it has one, comes next.

    Attributes:
        reading: The study.
        encoding: Its search space.
        observations: The trials of the search with a value, n.
        points: Their ordinary parameters, (n, E).
        model: The performance model.
        allocations: The rank configurations within the budget.

    Raises:
        ValueError: Several objectives, or no finished trial with ranks.
    """

    def __init__(self, reading: StudyReading, prior: PriorLike = "pretrained") -> None:
        study, space = reading.study, reading.space
        if len(study.directions) > 1:
            raise ValueError(f"expected one objective, this study has {len(study.directions)}; see study.best_trials.")
        reading.check_ranks()
        sampler = getattr(study, "sampler", None)
        choice = sampler.prior if isinstance(sampler, RankAdaptorSampler) else PriorChoice.of(prior)
        self._prior = choice.find(study)
        self.reading, self.encoding = reading, reading.encoding
        self.model = self.new_model()
        trials = reading.history.encoded(self.encoding, lambda _: self.model)
        self.observations = trials.observations()
        self.points = np.asarray([self.encoding.point(t.params) for t in self.observations.trials])
        self.fit_first(len(self.observations.trials))
        self._margin = trials.margin
        self._trials, self._failures = trials, trials.failure_model
        self._constraints = self._learned_constraints(_RISKS[0])
        self.allocations = Allocations.of(self.encoding.grid, math.inf if space is None else space.searched_budget)

    def _learned_constraints(self, risk: float) -> list[Belief]:
        space = self.reading.space
        by_construction = (BUDGET,) if space is not None and space.budget is not None else ()
        return self._trials.learned_constraints(risk, without=by_construction)

    def new_model(self) -> BayesianModel:
        """Returns a performance model of the search space without observations."""
        direction = "maximize" if self.reading.sign > 0 else "minimize"
        return BayesianModel(self.encoding.grid, prior=self._prior, direction=direction, n_ordinary=self.encoding.width)

    def fit_first(self, n: int) -> None:
        """Fits the model to the first ``n`` observations, by trial number."""
        observations = self.observations
        self.model.fit(observations.features[:n], observations.values[:n, 0], observations.variance[:n])

    @cached_property
    def _candidates(self) -> Points:
        """The ordinary parameters of the trials."""
        return Points(self.points, ordinary_features(self.points))

    def best(self, belief: Belief) -> tuple[Belief, Choice, Array]:
        """Maximises a belief under the constraints; the ordinary parameters are those of some trial.

        Returns:
            The belief, penalised until its optimum keeps the constraints; its best choice; its best point, (E,).
        """
        return within_constraints(
            belief,
            self._constraints,
            self.allocations,
            lambda belief: self._candidates,
            self._margin,
        )

    def safest(self, model: BayesianModel, n: int, verifications: Verifications) -> list[dict[str, Any]]:
        """Returns the configurations with the best lower bounds of their gains over uniform, see ``lower_bound``.

        The bound is concave in the features. It is maximised by the Frank-Wolfe algorithm (Jaggi, ICML 2013, algorithm
        1: step size 2 / (k + 2)) over convex combinations of configurations; each step's vertex is a configuration, the
        best of which is taken. Its neighbours are ranked by the linear part of the bound.

        Args:
            model: A performance model of the search space, fitted.
            n: Number of configurations, at most.
            verifications: Verified configurations; rejected ones are left out.

        Returns:
            Parameters of up to ``n`` configurations, at least one, the best first. The uniform configuration is added
            in front where the best bound is below 0.
        """
        for risk in _RISKS:
            self._constraints = self._learned_constraints(risk)
            few = self._best_bounds(model, n, verifications)
            if self._failures is None or self._probability_of_failing(few[0]) <= _RISKS[0]:
                break
        return few

    def _probability_of_failing(self, params: Mapping[str, Any]) -> float:
        assert self._failures is not None
        features = self.model.encode_with_cost(self.encoding.ranks(params), self.encoding.point(params))
        return float(self._failures.probability(features)[0])

    def _best_bounds(self, model: BayesianModel, n: int, verifications: Verifications) -> list[dict[str, Any]]:
        """Returns the configurations of ``safest`` under the constraints as they are."""
        belief, best = model.mean(), -np.inf
        average: Array = np.zeros(())
        for step in range(_FRANK_WOLFE_STEPS):
            _, choice, point = self.best(belief)
            difference = self._difference_to_uniform(self.params(choice, point))
            bound, _ = model.lower_bound(difference)
            if bound > best:
                best, chosen = bound, belief
            average = average + 2 / (step + 2) * (difference - average)
            _, belief = model.lower_bound(average)
        penalised, choice, point = self.best(chosen)

        def is_possible(choice: Choice) -> bool:
            key = verifications.configuration(self.params(choice, point))
            return key not in verifications.rejected and keeps(self._constraints, choice, point, self._margin)

        few = self.allocations.best_few(penalised.table, n, is_possible) or [choice]
        uniform = (self.allocations.ranks == self.encoding.grid.reference[:, None]).argmax(1)
        if model.lower_bound(self._difference_to_uniform(self.params(few[0], point)))[0] < 0 and is_possible(uniform):
            few.insert(0, uniform)
        return [self.params(choice, point) for choice in few]

    def _difference_to_uniform(self, params: Mapping[str, Any]) -> Array:
        return self.encode(params) - self.encode(self.uniform(params))

    def is_within_budget(self, params: Mapping[str, Any]) -> bool:
        """Returns whether a configuration's ranks are within the budget."""
        space = self.reading.space
        return space is None or space.is_within_budget(space.cost(space.to_ranks(params)))

    def params(self, choice: Choice, point: Array) -> dict[str, Any]:
        """Returns a choice of ranks and a point of the ordinary parameters, (E,), as the study's parameters."""
        return self.encoding.ordinary_params(point) | self.encoding.rank_params(self.allocations.ranks_of(choice))

    def uniform(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the uniform configuration with the ordinary parameters of ``params``."""
        return {**params, **self.encoding.rank_params(self.encoding.grid.reference)}

    def complete(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parameters together with those that are not searched with the ranks.

        These are as in the best trial, feasible where there is such, among the trials of the same branch of a
        conditional space: with the same names of parameters, and the same categories, as the nearest trial.
        """
        observed = self.observations

        def quality(i: int) -> tuple[bool, bool, float]:
            is_complete = observed.trials[i].state is TrialState.COMPLETE
            return bool(observed.feasible[i]), is_complete, self.reading.sign * float(observed.values[i, 0])

        def branch(i: int) -> tuple[set[str], list[str]]:
            given = observed.trials[i].params
            return set(given), [repr(given[name]) for name in self.encoding.categorical_names]

        distance = np.abs(self.points - np.asarray(self.encoding.point(params))).sum(1)
        numbers = range(len(observed.trials))
        nearest = branch(max((i for i in numbers if distance[i] <= distance.min() + _SAME_POINT), key=quality))
        best = max((i for i in numbers if branch(i) == nearest), key=quality)
        return {**observed.trials[best].params, **params}

    def repeats_differ(self) -> bool:
        """Returns whether trials of equal parameters have different scores, beyond rounding."""
        by_params: dict[str, list[float]] = {}
        for trial in self.observations.trials:
            if trial.state is TrialState.COMPLETE:
                by_params.setdefault(repr(sorted(trial.params.items())), []).append(trial.values[0])
        return max(map(np.ptp, by_params.values()), default=0.0) > _ROUNDING * self.model.spread

    def encode(self, params: Mapping[str, Any]) -> Array:
        """Returns a configuration's features, (F,)."""
        return self.model.encode(self.encoding.ranks(params), self.encoding.point(params))[0]
