"""Searches of several samplers on one task, side by side, and the configurations that they find."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from benchmarks.race.peers import Maker, distributions_of, params_of, ranks_of
from benchmarks.tasks.losses import Losses, SensitiveTask, Sensitivities, Task, Trials
from rankadaptor_optuna import RankSpace, recommend
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.studies.recommendation import Recommendation
from rankadaptor_optuna.surrogate.prior import Prior

SOURCE_ATTR = "source"  # marks trials that were another task's

Key = tuple[str, int]  # competitor and seed
Studies = Mapping[Key, Study]


def open_folder(folder: Path, name: str, task: Task) -> tuple[Losses, Trials]:
    """Returns the losses and trials of a task that the folder keeps."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace(" ", "-").replace(",", "")
    return Losses(task, folder / f"{stem}.csv"), Trials(folder / f"{stem}.trials.csv")


def sensitivities_of(
    folder: Path, name: str, task: SensitiveTask, seeds: int, who: Iterable[str]
) -> dict[Key, dict[str, float]]:
    """Returns the sensitivities that studies are told, by competitor and seed; the folder keeps them."""
    known = Sensitivities(task, folder / f"{name}.sensitivities.csv")
    return {(competitor, seed): known(seed) for competitor in who for seed in range(seeds)}


def search(
    space: RankSpace,
    losses: Losses,
    known: Trials,
    n_trials: int,
    seeds: int,
    makers: Mapping[str, Maker],
    *,
    sources: Mapping[Key, Sequence[tuple[Ranks, float]]] | None = None,
    sensitivities: Mapping[Key, Mapping[str, float]] | None = None,
) -> Studies:
    """Runs a task's searches side by side, so that trials are recovered together.

    Every search starts from the uniform configuration. The seed is that of the sampler and of the recoveries: all
    samplers of a seed see the same losses. A search that was stopped starts anew with the losses that are known; a
    finished one is read from its trials.

    Args:
        space: The rank space.
        losses: The losses.
        known: The trials of finished searches.
        n_trials: Number of trials of each search.
        seeds: Number of searches of each competitor.
        makers: The samplers by competitor.
        sources: Trials of other tasks to start with, by search.
        sensitivities: Sensitivities that a study knows, by search.

    Returns:
        The studies by search.
    """
    keys = [(who, seed) for who in makers for seed in range(seeds)]
    studies: dict[Key, Study] = {}
    for who, seed in keys:
        studies[who, seed] = study = optuna.create_study(sampler=makers[who](space, seed), direction="minimize")
        study.set_user_attr(SENSITIVITY_ATTR, (sensitivities or {}).get((who, seed), {}))
        distributions = distributions_of(who, space)
        for ranks, loss in (sources or {}).get((who, seed), ()):
            params = params_of(who, space, ranks)
            attrs = {SOURCE_ATTR: True}
            study.add_trial(
                optuna.create_trial(params=params, distributions=distributions, value=loss, user_attrs=attrs)
            )
        trials = known.of(who, seed)[:n_trials]
        if len(trials) == n_trials:
            asked = [dict(zip(distributions, values, strict=True)) for values in trials]
            values = losses([(ranks_of(who, space, FixedTrial(params)), seed) for params in asked])
            for params, value in zip(asked, values, strict=True):
                study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
        else:
            study.enqueue_trial(params_of(who, space, space.uniform()))
    new = [key for key in keys if len(finished(studies[key])) < n_trials]
    for n in range(n_trials if new else 0):
        asked_trials = {key: studies[key].ask() for key in new}
        found = losses([(ranks_of(who, space, trial), seed) for (who, seed), trial in asked_trials.items()])
        for (key, trial), loss in zip(asked_trials.items(), found, strict=True):
            studies[key].tell(trial, loss)
        print(f"trial {n + 1} of {n_trials} in {len(new)} searches, {losses.n_computed} recoveries", file=sys.stderr)
    if new:
        known.put({key: [list(trial.params.values()) for trial in finished(studies[key])] for key in new})
    return studies


def finished(study: Study) -> list[FrozenTrial]:
    """Returns the completed trials of a search, without those of other tasks."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if SOURCE_ATTR not in trial.user_attrs]


def best_trial(who: str, study: Study, space: RankSpace, n: int) -> Ranks:
    """Returns the configuration of the best of a search's first ``n`` trials."""
    best = min(finished(study)[:n], key=lambda t: float(t.values[0]))
    return ranks_of(who, space, FixedTrial(best.params))


def recommended(who: str, study: Study, space: RankSpace, n: int, prior: Prior | None = None) -> Recommendation:
    """Returns the recommendation, with a prior, from a search's first ``n`` trials."""
    until = optuna.create_study(direction="minimize")
    until.set_user_attr(SENSITIVITY_ATTR, study.user_attrs.get(SENSITIVITY_ATTR, {}))
    for trial in finished(study)[:n]:
        params: dict[str, Any] = space.to_params(ranks_of(who, space, FixedTrial(trial.params)))
        until.add_trial(optuna.create_trial(params=params, distributions=space.distributions(), value=trial.value))
    return recommend(until, space=space, prior=prior)
