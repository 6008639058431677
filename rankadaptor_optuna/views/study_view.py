"""StudyView: the numbers of a study that figures, pictures, notes and reports show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.attributes import converged_of, sensitivity_of
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.reading import StudyReading


@dataclass(frozen=True)
class StudyView:
    """The n finished trials of a study, by number, with L rank parameters in depth order; no verification trials.

    Attributes:
        space: The rank space; None where the study has none.
        numbers: Trial numbers, (n,).
        ranks: Ranks of each trial, (n, L).
        names: Names of the rank parameters, (L,).
        labels: Layer indices (or sublayers, ``"3.mlp"``), (L,); the parameters' names where no space is known and
            several of them belong to one layer.
        series: Positions in (L,) of each sublayer's ranks, or of all layers' ranks as ``""``.
        is_uniform: Whether each trial is the uniform configuration, (n,); all False without a space.
        within_budget: Whether each trial keeps to the budget, (n,); all True without a budget.
        scores: Score of each trial, (n,); None with several objectives.
        best: Best score so far within the budget, (n,), NaN before the first; None with several objectives.
        uniform_score: Mean score of the uniform trials; None without any.
        uniform_ranks: Ranks of the uniform configuration, (L,); None without a space.
        profile: Share of each layer's weights that pruning removed, (L,); None where unknown.
        sensitivity: Share of each layer in the score's sensitivity to all layers' adapters, (L,); None where unknown.
        objective: Name of the metric; ``"score"`` where it has none.
        minimize: Whether lower scores are better.
        n_pruned: Number of pruned trials.
        n_failed: Number of failed trials.
        converged: Statement of ``StopWhenConverged``; None unless it stopped the study.
    """

    space: RankSpace | None
    numbers: tuple[int, ...]
    ranks: NDArray[np.int64]
    names: tuple[str, ...]
    labels: tuple[int | str, ...]
    series: dict[str, slice]
    is_uniform: NDArray[np.bool_]
    within_budget: NDArray[np.bool_]
    scores: NDArray[np.float64] | None
    best: NDArray[np.float64] | None
    uniform_score: float | None
    uniform_ranks: tuple[int, ...] | None
    profile: tuple[float, ...] | None
    sensitivity: tuple[float, ...] | None
    objective: str
    minimize: bool
    n_pruned: int
    n_failed: int
    converged: str | None

    @classmethod
    def of(cls, reading: StudyReading) -> StudyView:
        """Returns the view of a study, which may have any number of objectives and of finished trials."""
        study, space, trials = reading.study, reading.space, reading.finished_trials
        names = reading.rank_names
        minimize = study.directions[0] is StudyDirection.MINIMIZE
        ranks = np.asarray([[t.params[name] for name in names] for t in trials], dtype=np.int64)
        ranks = ranks.reshape(len(trials), len(names))
        uniform = {t.number for t in reading.uniform_trials}
        is_uniform = np.asarray([t.number in uniform for t in trials], dtype=bool)
        within_budget = np.ones(len(trials), dtype=bool)
        if space is not None and space.budget is not None:  # another sampler may exceed it
            costs = [space.cost(Ranks(zip(space.modules, row, strict=True))) for row in ranks.tolist()]
            within_budget = np.asarray([space.is_within_budget(cost) for cost in costs])
        scores = best = None
        if len(study.directions) == 1:
            scores = np.asarray([t.value for t in trials], dtype=np.float64)
            better = np.fmin if minimize else np.fmax  # these skip NaN
            best = better.accumulate(np.where(within_budget, scores, np.nan))
        stored = sensitivity_of(study.user_attrs)
        sensitivity = [stored.get(name, np.nan) for name in names]
        whole = sum(sensitivity)
        states = [t.state for t in reading.trials]
        return cls(
            space=space,
            numbers=tuple(t.number for t in trials),
            ranks=ranks,
            names=tuple(names),
            labels=tuple(names.values()) if len(set(names.values())) == len(names) else tuple(names),
            series={"": slice(None)} if space is None else space.series,
            is_uniform=is_uniform,
            within_budget=within_budget,
            scores=scores,
            best=best,
            uniform_score=float(scores[is_uniform].mean()) if scores is not None and is_uniform.any() else None,
            uniform_ranks=None if space is None else tuple(space.uniform().values()),
            profile=space.profile if space is not None and any(space.profile) else None,
            sensitivity=tuple(value / whole for value in sensitivity) if whole > 0 else None,
            objective=_metric_name(study),
            minimize=minimize,
            n_pruned=states.count(TrialState.PRUNED),
            n_failed=states.count(TrialState.FAIL),
            converged=converged_of(study.user_attrs),
        )


def _metric_name(study: Study) -> str:
    """Returns the name of the first metric, which anyone may have stored; ``"score"`` where it has none."""
    names = study.metric_names
    return one_line(names[0]) if isinstance(names, list) and names else "score"
