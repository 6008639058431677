"""recommend: the rank configuration that a study's performance model expects to be best, and the evidence for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from optuna.study import Study

from rankadaptor_optuna.database.attributes import unrecovered_of
from rankadaptor_optuna.priors.choice import PriorLike
from rankadaptor_optuna.ranks import LoraSettings, Ranks
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.statement import failures_statement, gain_statement, uniform_statement, worse_than_none
from rankadaptor_optuna.studies.verification import Configuration, Confirmation, Verifications
from rankadaptor_optuna.surrogate.statistics import alike, t_interval

_MIN_SEEDS = 2  # a variance needs two
_MAX_DEVIATION = 5  # of a verification score from its seed's median, in standard deviations of the search's; by hand
_NORMAL_975 = 1.96  # 97.5% quantile of the standard normal distribution
_N_CLOSEST = 3
_UNEQUAL = 0.05  # relative difference of total ranks that is worth a sentence; set by hand


@dataclass(frozen=True)
class Evidence:
    """The evidence for a recommendation.

    Attributes:
        n_trials: Number of trials of the search that the performance model learned from.
        gain: Predicted gain over the uniform configuration on other seeds of the recovery and other text, in score
            units, positive is better.
        interval: Its central 95% interval.
        closest: The nearest finished trials: (trial number, number of differing ranks, score).
        statement: How far the data supports the recommendation, in a sentence or two.
        confirmed: Gain that verification trials measured on fresh seeds; None without two such seeds.
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
        ranks: Rank of each searched layer, ``{layer index: rank}``, or part of a layer, ``{"0.mlp": rank}``; empty
            where no space is known and the parameters' names do not say which modules have their ranks: see ``params``.
        params: The study's parameters with these ranks, and the best ordinary parameters; parameters that are not
            searched with the ranks are those of the best feasible trial with the same categories.
        predicted: Predicted score on the search's own seed.
        std: Standard deviation of that prediction.
        cost: Trainable parameters (sum of ranks where no space is known).
        evidence: The evidence for it.
        all_ranks: ``ranks`` and the ranks of adapted layers that were not searched.
        lora: The adapters' settings beside their ranks: those of the study's recipe, else the defaults.
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
    def lora_arguments(self) -> dict[str, Any]:
        """The arguments of ``peft.LoraConfig``, complete: layers of rank 0 get no adapter.

        ``target_modules`` are the recipe's, else LLaMA's seven projections; replace them if your training has others.

        Raises:
            ValueError: No layer has a positive rank, or ``ranks`` is empty.
        """
        return self._modules.lora_arguments(self.lora)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """``rank_pattern`` of ``peft.LoraConfig``.

        It lacks layers of rank 0, to which PEFT gives its default rank: prefer ``lora_arguments``.

        Raises:
            ValueError: ``ranks`` is empty.
        """
        return self._modules.rank_pattern_of(self.lora)

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """``alpha_pattern`` of ``peft.LoraConfig``: in proportion to the ranks, unless the recipe sets one alpha.

        Raises:
            ValueError: ``ranks`` is empty.
        """
        return self._modules.alpha_pattern(self.lora)

    @property
    def _modules(self) -> Ranks:
        if not self.all_ranks:
            raise ValueError("the rank parameters' names do not say which modules have these ranks; see params.")
        return self.all_ranks


def recommend(
    study: Study,
    *,
    space: RankSpace | None = None,
    ranks: str | Sequence[str] | None = None,
    prior: PriorLike = "pretrained",
    verify: int = 0,
    seeds: int = 3,
    independent_noise: bool | None = None,
) -> Recommendation:
    """Returns the configuration within the budget that is expected to be best, with caution.

    It maximises the posterior mean of the gain over uniform less half its standard deviation, as the best of many
    predictions errs upwards (the optimizer's curse: Smith & Winkler, Management Science 52(3), 2006). Where no
    configuration is above 0 by that measure, it is the uniform configuration. Where objectives set constraints, it is
    expected to keep them. It is never chosen for being the best single trial.

    With ``verify=k``, trials are enqueued that run the k best configurations (tried or not) and the uniform
    configuration on fresh seeds, unless the study has them already. Any worker's ``study.optimize`` runs them, with an
    objective that follows ``verification_seed``. The next call learns from them and reports the gain they measured. It
    then recommends the verified configuration (or uniform) that is expected to be best, unless the model is sure (95%)
    of a better one.

    Args:
        study: A study with one objective; any sampler may have made its trials.
        space: The rank space. Default: the sampler's, else the space stored with the study; without any there is no
            budget.
        ranks: Templates of the rank parameters' names where there is no space, see ``RankAdaptorSampler``. Default:
            those stored with the study; without any, ranks are recognised by their names and ranges.
        prior: The performance model's prior, see ``PriorChoice``; used for a study that neither began with a prior nor
            has a ``RankAdaptorSampler``.
        verify: Number of configurations to verify. Default: none.
        seeds: Number of fresh seeds for each, at least 2.
        independent_noise: Whether every trial draws its own random numbers. Then gains found by many trials last; where
            trials share a seed, a part of their differences is that seed's alone. Default: True where trials of equal
            parameters have different scores, else False.

    Raises:
        ValueError: Several objectives, no finished trial, no rank parameters, or ``verify`` or ``seeds`` too small.
    """
    reading = StudyReading(study, space, ranks)
    return recommend_from(reading, prior=prior, verify=verify, seeds=seeds, independent_noise=independent_noise)


def recommend_from(
    reading: StudyReading,
    *,
    prior: PriorLike = "pretrained",
    verify: int = 0,
    seeds: int = 3,
    independent_noise: bool | None = None,
) -> Recommendation:
    """Returns the recommendation of a study that was read already; see ``recommend``."""
    if verify < 0 or seeds < _MIN_SEEDS:
        raise ValueError(f"verify must be at least 0 and seeds at least {_MIN_SEEDS}, got {verify} and {seeds}.")
    fitted = FittedStudy(reading, prior)
    verifications = Verifications(reading, fitted.encoding.rank_names + fitted.encoding.ordinary_names)
    best = fitted.safest(fitted.model, verify + 1, verifications)  # one may be uniform
    differences = _differences(fitted, verifications)
    params = _preferred(fitted, verifications, differences) if differences else best[0]
    confirmed = None
    if measured := differences.get(verifications.configuration(params)):
        interval = t_interval(measured, 1 - 0.05 / len(differences))  # Bonferroni: one of several was chosen
        gain = float(np.mean(measured))
        confirmed = Confirmation(gain, interval, len(measured), len(differences), alike(measured))
    if verify:
        wanted = [params, *(each for each in best if each != params)]
        wanted = [each for each in wanted if each != fitted.uniform(each)][:verify] or [params]
        runs = [fitted.complete(run) for each in wanted for run in (each, fitted.uniform(each))]
        verifications.enqueue(runs, seeds)
    if independent_noise is None:
        independent_noise = fitted.repeats_differ()
    found = _explained(fitted, params, confirmed, len(differences), independent_noise=independent_noise)
    return found if not verifications.failed else _with_failures(found, len(verifications.failed))


def _with_failures(found: Recommendation, n_failed: int) -> Recommendation:
    statement = found.evidence.statement + failures_statement(n_failed)
    return replace(found, evidence=replace(found.evidence, statement=statement))


_Differences = dict[Configuration, list[float]]


def _differences(fitted: FittedStudy, verifications: Verifications) -> _Differences:
    """Returns the differences to uniform by seed of each verified configuration that may be recommended."""
    differences = {}
    for key in verifications.scores:
        params = verifications.params(key)
        uniform = verifications.configuration(fitted.uniform(params))
        possible = key not in verifications.rejected and fitted.is_within_budget(params)
        by_seed = verifications.differences(key, uniform)
        if key != uniform and possible and len(by_seed) >= _MIN_SEEDS:
            differences[key] = by_seed
    return differences


def _preferred(fitted: FittedStudy, verifications: Verifications, differences: _Differences) -> dict[str, Any]:
    """Returns the verified configuration, or uniform, with the best posterior mean given the verification trials too.

    The model shrinks the part of a measured gain that chance added. Its own optimum is returned where it is better
    with 97.5% confidence.
    """
    informed = fitted.new_model()
    features, scores = verifications.contrasts(
        lambda key: fitted.encode(verifications.params(key)), _MAX_DEVIATION * fitted.model.spread
    )
    observations = fitted.observations
    informed.fit(
        np.concatenate([observations.features, features]),
        np.concatenate([observations.values[:, 0], fitted.reading.sign * scores]),
        np.concatenate([observations.variance, np.zeros(len(features))]),
    )
    verified = [verifications.params(key) for key in differences]
    uniform = [fitted.uniform(params) for params in verified]
    verified += [each for each in uniform if verifications.configuration(each) not in verifications.rejected]
    encoded = np.stack([fitted.encode(params) for params in verified])
    best = int(informed.predict_difference(encoded, encoded[:1])[0].argmax())
    optimum = fitted.safest(informed, 1, verifications)[0]
    lead, std = (float(x[0]) for x in informed.predict_difference(fitted.encode(optimum)[None], encoded[best][None]))
    return optimum if lead > _NORMAL_975 * std else verified[best]


def _explained(
    fitted: FittedStudy,
    params: dict[str, Any],
    confirmed: Confirmation | None,
    n_verified: int,
    *,
    independent_noise: bool,
) -> Recommendation:
    """Returns the recommendation of ``params`` with its evidence."""
    reading, model, observations = fitted.reading, fitted.model, fitted.observations
    chosen, uniform = np.asarray(fitted.encoding.ranks(params)), fitted.encoding.grid.reference
    own_gain, own_std = (float(x[0]) for x in model.predict_gain(chosen))
    lasting = model.predict_gain if independent_noise else model.predict_lasting_gain
    gain, gain_std = (float(x[0]) for x in lasting(chosen))
    predicted, std = (float(x[0]) for x in model.predict(chosen, fitted.encoding.point(params)))
    n_trials, interval = len(observations.trials), (gain - _NORMAL_975 * gain_std, gain + _NORMAL_975 * gain_std)
    fixed = None if reading.space is None else reading.space.fixed_ranks
    if (chosen == uniform).all():
        statement = uniform_statement(uniform, n_trials, n_verified, fixed)
    else:
        holds = own_gain > _NORMAL_975 * own_std
        statement = gain_statement(
            uniform, n_trials, gain, interval, holds_on_own_seed=holds, confirmed=confirmed, fixed=fixed
        )
        if reading.space is None and abs(chosen.sum() / uniform.sum() - 1) > _UNEQUAL:
            times = f"{chosen.sum() / uniform.sum():.2g} times as much"
            statement += f" The costs differ: its ranks add up to {times}; a RankSpace sets a budget."
    unrecovered = unrecovered_of(reading.study.user_attrs)
    if unrecovered is not None and chosen.any() and reading.sign * predicted < reading.sign * unrecovered:
        statement += worse_than_none(predicted, unrecovered)
    differing = (np.asarray([fitted.encoding.ranks(t.params) for t in observations.trials]) != chosen).sum(1)
    nearest = np.argsort(differing, kind="stable")[:_N_CLOSEST]
    closest = [(observations.trials[i].number, int(differing[i]), float(observations.values[i, 0])) for i in nearest]
    space, ranks = reading.space, reading.ranks(params)
    return Recommendation(
        ranks=ranks,
        params=fitted.complete(params),
        predicted=predicted,
        std=std,
        cost=float(chosen.sum()) if space is None else space.cost(ranks),
        evidence=Evidence(n_trials, gain, interval, tuple(closest), statement, confirmed),
        all_ranks=ranks if space is None else space.with_fixed(ranks),
        lora=reading.lora,
    )
