"""The answer of a study: the rank configuration that the performance model expects to be best, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from optuna.study import Study, StudyDirection

from rankadaptor_optuna.attributes import RECIPE_ATTR
from rankadaptor_optuna.priors.choice import PriorChoice, PriorLike
from rankadaptor_optuna.ranks import LoraSettings, Ranks
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.space import BUDGET, RankSpace
from rankadaptor_optuna.studies.reading import finished_trials, study_encoding, study_ranks, study_space
from rankadaptor_optuna.studies.verification import Configuration, Confirmation, Verifications
from rankadaptor_optuna.surrogate.allocations import Allocations, keeps, within_constraints
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.belief import Belief
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.knapsack import Choice
from rankadaptor_optuna.surrogate.statistics import t_interval

_MIN_SEEDS = 2
_MAX_DEVIATION = 5
_STEPS = 16


@dataclass(frozen=True)
class Evidence:
    """What a recommendation rests on.

    Attributes:
        n_trials: Finished trials of the search that the performance model learned from.
        gain: Gain over the uniform configuration that the search predicts for other seeds of the recovery and other
            text, in score units, positive is better.
        interval: Its central 95% interval.
        closest: The nearest finished trials: (number, ranks that differ, score).
        statement: The same in a sentence or two.
        confirmed: The gain that verification trials measured on fresh seeds; None without at least two such seeds.
    """

    n_trials: int
    gain: float
    interval: tuple[float, float]
    closest: tuple[tuple[int, int, float], ...]
    statement: str
    confirmed: Confirmation | None = None


@dataclass(frozen=True)
class Recommendation:
    """The rank configuration that the performance model expects to be best.

    Attributes:
        ranks: Rank of each searched layer, ``{layer index: rank}``, or sublayer, ``{"0.mlp": rank}``; empty where no
            space is known and several rank parameters belong to one layer: see ``params`` then.
        params: The study's parameters with these ranks (and the best other parameters, where there are any).
        predicted: Score that the search predicts.
        std: Standard deviation of that prediction.
        cost: Trainable parameters (sum of ranks where no space is known).
        evidence: What it rests on.
        all_ranks: Also the ranks of adapted layers that were not searched.
        lora: The adapters' other settings: those of the study's recipe, where it has one.
    """

    ranks: Ranks
    params: dict[str, Any]
    predicted: float
    std: float
    cost: float
    evidence: Evidence
    all_ranks: Ranks = field(repr=False)
    lora: LoraSettings = field(default_factory=LoraSettings, repr=False)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For ``peft.LoraConfig(rank_pattern=...)``; empty where ``ranks`` is."""
        return self.all_ranks.rank_pattern

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """For ``peft.LoraConfig(alpha_pattern=...)``: alpha proportional to rank, unless the recipe has one for all."""
        return self.all_ranks.alpha_pattern(self.lora)


class Findings:
    """What the performance model makes of a study's search.

    Args:
        study: A study.
        space: The rank space. Default: the sampler's, else the one stored with the study, else read off the
            parameters' names and ranges, without a budget.
        prior: See ``PriorChoice``. Of a study that began with a prior, or whose own sampler has one, that is used.

    Attributes:
        space: The rank space, or None.
        names: The rank parameters, ``{name: layer index}``.
        encoding: The search space.
        data: The trials with a value.
        points: Their other parameters, (n, E).
        model: The performance model, fitted to them.
        allocations: The rank configurations within the budget.
        lora: The adapters' other settings: those of the study's recipe, where it has one.
        sign: 1 where higher scores are better, else -1.

    Raises:
        ValueError: Several objectives, no rank parameters, or no finished trial.
    """

    def __init__(self, study: Study, space: RankSpace | None, prior: PriorLike = "pretrained") -> None:
        if len(study.directions) > 1:
            raise ValueError(f"expected one objective, this study has {len(study.directions)}; see study.best_trials.")
        self.space = space = space or study_space(study)
        self.names = study_ranks(study, space)
        if not self.names:
            raise ValueError("the study has no rank parameters: names with a layer number and integer values.")
        if not finished_trials(study, space):
            raise ValueError(f"study {study.study_name!r} has no finished trial yet; run some first.")
        sampler = getattr(study, "sampler", None)
        choice = sampler.prior if isinstance(sampler, RankAdaptorSampler) else PriorChoice.of(prior)
        self._prior = choice.find(study)
        self.lora = LoraSettings.of(study.user_attrs.get(RECIPE_ATTR, {}).get("lora", {}))
        self.sign = 1.0 if study.direction is StudyDirection.MAXIMIZE else -1.0
        history = History(study)
        history.refresh()
        self.encoding = study_encoding(study, history, space)
        self.model = self.new_model()
        trials = history.encoded(self.encoding, lambda _: self.model)
        self.data = trials.data()
        self.points = np.asarray([self.encoding.point(t.params) for t in self.data.trials])
        self.learn_from(len(self.data.trials))
        limited = trials.constraints()
        if space is not None and space.budget is not None:
            limited.pop(BUDGET, None)  # held by construction
        self.allocations = Allocations.of(self.encoding.grid, math.inf if space is None else space.searched_budget)
        self._constraints = [self.model.constraint(*limited[name]) for name in limited]

    def new_model(self) -> BayesianModel:
        """A performance model of the search space that has seen nothing."""
        grid, direction = self.encoding.grid, "maximize" if self.sign > 0 else "minimize"
        return BayesianModel(grid, prior=self._prior, direction=direction, n_ordinary=self.encoding.width)

    def learn_from(self, n: int) -> None:
        """Fits the model to the first ``n`` trials, by number."""
        self.model.fit(self.data.rows[:n], self.data.values[:n, 0], self.data.variance[:n])

    def best(self, belief: Belief) -> tuple[Belief, Choice, Array]:
        """The belief penalised until its best choice keeps the constraints, that choice, and the best point tried."""
        return within_constraints(
            belief,
            self._constraints,
            self.allocations,
            lambda belief: self.points[belief.of_ordinary(self.points).argmax()],
            self.data.margin,
        )

    def safest(self, model: BayesianModel, n: int, verifications: Verifications) -> list[dict[str, Any]]:
        """Configurations with the best lower bounds of a gain over uniform, the best first: up to n, one at least.

        Uniform comes before them where all bounds are below 0. The bound is concave in the features: Frank and Wolfe's
        algorithm, of whose steps, configurations all, the best one's neighbours by the bound's linear part are taken.
        """
        belief, best = model.mean(), -np.inf
        average: Array = np.zeros(())
        for step in range(_STEPS):
            _, choice, point = self.best(belief)
            difference = self._over_uniform(self.params(choice, point))
            bound, _ = model.lower_bound(difference)
            if bound > best:
                best, chosen = bound, belief
            average = average + 2 / (step + 2) * (difference - average)
            _, belief = model.lower_bound(average)
        penalised, choice, point = self.best(chosen)

        def is_possible(choice: Choice) -> bool:
            broke = verifications.configuration(self.params(choice, point)) in verifications.infeasible
            return not broke and keeps(self._constraints, choice, point, self.data.margin)

        few = self.allocations.best_few(penalised.table, n, is_possible) or [choice]
        uniform = (self.allocations.ranks == self.encoding.grid.reference[:, None]).argmax(1)
        if model.lower_bound(self._over_uniform(self.params(few[0], point)))[0] < 0 and is_possible(uniform):
            few.insert(0, uniform)
        return [self.params(each, point) for each in few]

    def _over_uniform(self, params: Mapping[str, Any]) -> Array:
        return self.encode(params) - self.encode(self.uniform(params))

    def is_within_budget(self, params: Mapping[str, Any]) -> bool:
        """Whether a configuration's ranks are within the budget."""
        return self.space is None or self.space.is_within_budget(self.space.cost(self.space.to_ranks(params)))

    def params(self, choice: Choice, point: Array) -> dict[str, Any]:
        """A configuration as the study's parameters."""
        ranks = zip(self.encoding.rank_names, self.allocations.ranks_of(choice), strict=True)
        return {**self.encoding.decode(point), **dict(ranks)}

    def uniform(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The uniform configuration, with the other parameters as they are."""
        ranks = map(int, self.encoding.grid.reference)
        return {**params, **dict(zip(self.encoding.rank_names, ranks, strict=True))}

    def encode(self, params: Mapping[str, Any]) -> Array:
        """A configuration's features, (F,)."""
        return self.model.encode(self.encoding.ranks(params), self.encoding.point(params))[0]


def recommend(
    study: Study,
    *,
    space: RankSpace | None = None,
    prior: PriorLike = "pretrained",
    verify: int = 0,
    seeds: int = 3,
) -> Recommendation:
    """The configuration inside the budget that is expected to be best, with caution: never just the luckiest trial.

    What is maximised is the posterior mean of the gain over uniform less half its standard deviation: where a great
    many predictions are compared, the best is one that errs upwards (the optimizer's curse: Smith & Winkler, 2006).
    Where nothing is above 0 by that measure, it is uniform itself. Where objectives set constraints, it is one that is
    expected to keep them.

    With ``verify=k``, trials that run the k best configurations (tried or not) and the uniform one on fresh seeds are
    enqueued, less those that are there already: ``study.optimize`` of any worker runs them, with an objective that
    heeds ``verification_seed``. The next call learns from them, and says what they confirm. It then recommends the
    verified configuration (or uniform) that is expected to be best, unless the model is sure (95%) of a better one.

    Args:
        study: A study with one objective; any sampler may have made its trials.
        space: The rank space. Default: the sampler's, else the one stored with the study, else read off the
            parameters' names and ranges, without a budget.
        prior: See ``PriorChoice``. Of a study that began with a prior, or whose own sampler has one, that is used.
        verify: Configurations to verify. Default: none.
        seeds: Fresh seeds for each, at least 2.

    Raises:
        ValueError: Several objectives, no finished trial, no rank parameters, or too few to verify.
    """
    if verify < 0 or seeds < _MIN_SEEDS:
        raise ValueError(f"verify must be at least 0 and seeds at least {_MIN_SEEDS}, got {verify} and {seeds}.")
    found = Findings(study, space, prior)
    verifications = Verifications(study, found.encoding.rank_names + found.encoding.ordinary_names)
    best = found.safest(found.model, verify + 1, verifications)  # one may be uniform
    differences = _differences(found, verifications)
    params = _preferred(found, verifications, differences) if differences else best[0]
    confirmed = None
    if measured := differences.get(verifications.configuration(params)):
        interval = t_interval(measured, 1 - 0.05 / len(differences))  # one of several was chosen: Bonferroni
        confirmed = Confirmation(float(np.mean(measured)), interval, len(measured), len(differences))
    recommendation = _explained(found, params, confirmed, len(differences))
    if verify:
        wanted = [params, *(each for each in best if each != params)]
        wanted = [each for each in wanted if each != found.uniform(each)][:verify] or [params]
        verifications.enqueue([p for each in wanted for p in (each, found.uniform(each))], seeds)
    return recommendation


_Differences = dict[Configuration, list[float]]


def _differences(found: Findings, verifications: Verifications) -> _Differences:
    """Of each verified configuration to uniform, by seed; none of those that may not be recommended."""
    differences = {}
    for key in verifications.scores:
        params = verifications.params(key)
        uniform = verifications.configuration(found.uniform(params))
        possible = key not in verifications.infeasible and found.is_within_budget(params)
        by_seed = verifications.differences(key, uniform)
        if key != uniform and possible and len(by_seed) >= _MIN_SEEDS:
            differences[key] = by_seed
    return differences


def _preferred(found: Findings, verifications: Verifications, differences: _Differences) -> dict[str, Any]:
    """The verified configuration, or uniform, with the best posterior mean given the verification trials too.

    The model shrinks what chance adds to the best of several. Its own optimum wins where it is better for sure.
    """
    informed = found.new_model()
    rows, scores = verifications.contrasts(
        lambda key: found.encode(verifications.params(key)), _MAX_DEVIATION * found.model.spread
    )
    data = found.data
    informed.fit(
        np.concatenate([data.rows, rows]),
        np.concatenate([data.values[:, 0], found.sign * scores]),
        np.concatenate([data.variance, np.zeros(len(rows))]),
    )
    verified = [verifications.params(key) for key in differences]
    uniform = [found.uniform(params) for params in verified]
    verified += [each for each in uniform if verifications.configuration(each) not in verifications.infeasible]
    encoded = np.stack([found.encode(params) for params in verified])
    best = int(informed.predict_difference(encoded, encoded[:1])[0].argmax())
    optimum = found.safest(informed, 1, verifications)[0]
    ahead, std = (float(x[0]) for x in informed.predict_difference(found.encode(optimum)[None], encoded[best][None]))
    return optimum if ahead > 1.96 * std else verified[best]


def _explained(
    found: Findings, params: dict[str, Any], confirmed: Confirmation | None, n_verified: int
) -> Recommendation:
    model, data, grid = found.model, found.data, found.encoding.grid
    chosen = np.asarray(found.encoding.ranks(params))
    own_gain, own_std = (float(x[0]) for x in model.predict_gain(chosen))
    gain, gain_std = (float(x[0]) for x in model.predict_lasting_gain(chosen))
    predicted, std = (float(x[0]) for x in model.predict(chosen, found.encoding.point(params)))
    ranks = Ranks({module: params[name] for name, module in found.names.items()})
    if len(ranks) < len(found.names):
        ranks = Ranks()
    differing = (np.asarray([found.encoding.ranks(t.params) for t in data.trials]) != chosen).sum(1)
    nearest = np.argsort(differing, kind="stable")[:3]
    evidence = Evidence(
        n_trials=len(data.trials),
        gain=gain,
        interval=(gain - 1.96 * gain_std, gain + 1.96 * gain_std),
        closest=tuple((data.trials[i].number, int(differing[i]), float(data.values[i, 0])) for i in nearest),
        statement="",
        confirmed=confirmed,
    )
    is_uniform = bool((chosen == grid.reference).all())
    return Recommendation(
        ranks=ranks,
        params=params,
        predicted=predicted,
        std=std,
        cost=float(chosen.sum()) if found.space is None else found.space.cost(ranks),
        evidence=replace(
            evidence,
            statement=_statement(evidence, is_uniform, own_gain > 1.96 * own_std, grid.reference, n_verified),
        ),
        all_ranks=ranks if found.space is None else found.space.with_fixed(ranks),
        lora=found.lora,
    )


def _statement(evidence: Evidence, is_uniform: bool, holds_on_own_seed: bool, reference: Array, n_verified: int) -> str:
    n, (low, high), confirmed = evidence.n_trials, evidence.interval, evidence.confirmed
    uniform = f"rank {reference[0]:g} everywhere" if len(set(reference)) == 1 else "the middle of each rank's range"
    if is_uniform:
        verified = f" and {n_verified} verified on fresh seeds" if n_verified else ""
        return f"After {n} trials{verified} {uniform} itself is recommended: nothing else is safely better."
    interval = f"95% interval {low:+.4f} to {high:+.4f}"
    detail = f"predicted gain over {uniform} {evidence.gain:+.4f} on fresh seeds, {interval}, from {n} trials"
    if low > 0:
        said = f"Supported by the data: {detail}."
    elif confirmed is not None:
        said = f"The search alone does not support a gain: {detail}."
    elif holds_on_own_seed:
        said = f"Supported on the search's own seed alone: {detail}."
    else:
        said = f"The data does not support a gain yet: {detail}."
    if confirmed is None:
        return said
    low, high = confirmed.interval
    verdict = "Confirmed" if low > 0 else "Worse than uniform" if high < 0 else "Not confirmed"
    measured = f"measured gain {confirmed.gain:+.4f}, 95% interval {low:+.4f} to {high:+.4f}"
    if confirmed.n_verified > 1:
        measured += f" (one chosen among {confirmed.n_verified}: the gain flatters, the interval allows for it)"
    return f"{said} {verdict} on {confirmed.n_seeds} fresh seeds: {measured}."
