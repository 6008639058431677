"""The results that jobs return: data for a view to show, without words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankadaptor_optuna.surrogate.statistics import alike, t_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from optuna.study import Study

    from rankadaptor_optuna.jobs.recipe import Recipe
    from rankadaptor_optuna.priors.store import Version
    from rankadaptor_optuna.pruning.core import PrunedModel
    from rankadaptor_optuna.ranks import Ranks
    from rankadaptor_optuna.space import RankSpace
    from rankadaptor_optuna.studies.recommendation import Recommendation
    from rankadaptor_optuna.surrogate.prior import Prior

DENSE, NONE, UNIFORM, FISHER, OURS = "dense", "no recovery", "LoRA, uniform", "Fisher-proportional", "RankAdaptor"
COMPARED_METHODS = (NONE, UNIFORM, "AdaLoRA", "EVA", FISHER, OURS)
UNTRAINED = (DENSE, NONE)  # measured once, as no seed matters
EQUAL_PARAMETERS = 0.01  # largest share by which numbers of parameters count as equal; set by hand


@dataclass(frozen=True)
class PruneResult:
    """The result of ``prune``.

    Attributes:
        pruned: The pruned model and the share that each layer lost.
        ratio: Share of the transformer blocks' parameters to remove, as asked for.
        parameters_before: Number of parameters of the dense model; tied ones count once.
        parameters_after: The same of the pruned model.
        perplexities: Perplexity on held-out embedded text of the dense and of the pruned model.
        out: Folder of the checkpoint.
    """

    pruned: PrunedModel
    ratio: float
    parameters_before: int
    parameters_after: int
    perplexities: tuple[float, float]
    out: Path


@dataclass(frozen=True)
class SearchResult:
    """The result of ``search``.

    Attributes:
        study: The study.
        study_name: Its name.
        storage: URL of its storage, with any password: show it through ``database.masked``.
        recipe: The definition of a trial.
        space: The rank space.
        recommendation: The recommended configuration.
        pruned: The pruned model and the share that each layer lost; None if this run did not prune.
        out: Folder of the pruned model and the recommendation.
    """

    study: Study
    study_name: str
    storage: str
    recipe: Recipe
    space: RankSpace
    recommendation: Recommendation
    pruned: PrunedModel | None
    out: Path


@dataclass(frozen=True)
class Row:
    """Measurements of one method of a comparison.

    Attributes:
        method: Its name.
        losses: Loss on the report data by fresh seed, nats per target token.
        accuracies: Accuracy by task and fresh seed.
        scores: The searched metric (margin or accuracy) by fresh seed, on other items than the search saw; empty if
            the metric is the loss.
        parameters: Trainable parameters in use at the end, the most of any seed.
        seconds: Mean wall time of the training.
        total_parameters: All parameters of the model with its adapter; 0 if an earlier version measured the row.
    """

    method: str
    losses: list[float]
    accuracies: dict[str, list[float]]
    scores: dict[str, list[float]]
    parameters: int
    seconds: float
    total_parameters: int = 0


@dataclass(frozen=True)
class PairedDifference:
    """The recommended ranks less a reference by one measure, paired over the same fresh seeds.

    Attributes:
        measure: ``"loss"`` or the searched metric.
        mean: Mean of the differences, in the measure's unit.
        interval: 95% t interval of the mean.
        alike: Whether all seeds differ by the same amount, as coarse scores may: no spread to compute an interval from.
        verdict: ``"better"`` or ``"worse"`` than the reference if the interval excludes 0, else ``"tie"``.
    """

    measure: str
    mean: float
    interval: tuple[float, float]
    alike: bool
    verdict: Literal["better", "worse", "tie"]

    @classmethod
    def of(cls, measure: str, differences: NDArray[np.float64]) -> PairedDifference:
        """Statistics of differences by seed; a lower loss is better, a higher value of any other measure."""
        low, high = t_interval(differences)
        same = alike(differences)
        sign = -1 if measure == "loss" else 1
        lower = 0.0 if same else min(sign * low, sign * high)
        upper = 0.0 if same else max(sign * low, sign * high)
        verdict: Literal["better", "worse", "tie"] = "better" if lower > 0 else "worse" if upper < 0 else "tie"
        return cls(measure, float(differences.mean()), (low, high), same, verdict)


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    Attributes:
        rows: One row per method, in the order asked for.
        settings: Recipe, ranks and tasks of the comparison, as in ``compare.json``.
        budget: Largest number of trainable parameters; None if the space has no budget.
        seeds: The fresh seeds.
        ranks: The recommended ranks.
        uniform: The uniform ranks.
        out: Folder of the results.
    """

    rows: list[Row]
    settings: Mapping[str, Any]
    budget: float | None
    seeds: tuple[int, ...]
    ranks: Ranks
    uniform: Ranks
    out: Path

    def row(self, method: str) -> Row:
        """The row of a method; raises KeyError if the comparison lacks it."""
        return {row.method: row for row in self.rows}[method]

    @property
    def references(self) -> list[str]:
        """The methods that train on the same seeds as RankAdaptor."""
        return [row.method for row in self.rows if row.method not in (*UNTRAINED, OURS)]

    def cost_difference(self, reference: str) -> float:
        """RankAdaptor's trainable parameters less a reference's, as a share of the reference's; 0 where under 1%."""
        ours, other = (self.row(method).parameters for method in (OURS, reference))
        share = ours / other - 1 if other else float(ours > 0)
        return share if abs(share) > EQUAL_PARAMETERS else 0.0

    def paired(self, reference: str, measure: str = "loss") -> PairedDifference:
        """RankAdaptor less a reference on the same fresh seeds, by ``"loss"`` or a key of ``Row.scores``."""
        ours, other = (
            np.asarray(row.losses if measure == "loss" else row.scores[measure])
            for row in (self.row(OURS), self.row(reference))
        )
        return PairedDifference.of(measure, ours - other)


@dataclass(frozen=True)
class Exported:
    """The result of ``export``.

    Attributes:
        recommendation: The recommended configuration, which was trained.
        recipe: The definition of a trial, with the number of steps trained.
        study_name: Name of the study.
        storage_masked: URL of its storage without a password.
        loss: Loss on the validation data after the recovery, nats per target token.
        loss_before: The same of the pruned model.
        base: The model that the adapter belongs to: absolute path of its folder, or Hub name.
        out: Folder of the adapter.
    """

    recommendation: Recommendation
    recipe: Recipe
    study_name: str
    storage_masked: str
    loss: float
    loss_before: float
    base: str
    out: Path


@dataclass(frozen=True)
class QuickstartResult:
    """The result of ``quickstart``.

    Attributes:
        search: The search.
        comparison: Dense, pruned, uniform and recommended on fresh seeds and text that the search has not seen.
        exported: The adapter of the recommended ranks, in ``out/adapter``.
        seconds: Wall time of this run.
    """

    search: SearchResult
    comparison: Comparison
    exported: Exported
    seconds: float


@dataclass(frozen=True)
class TrainedPrior:
    """The result of ``train_prior``.

    Attributes:
        version: Name and number under which the database holds the prior.
        prior: The prior.
        n_studies: Number of studies that it was learned from.
        skipped: Reason by name of each study that was not used.
    """

    version: Version
    prior: Prior
    n_studies: int
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """What ``collect_unused`` removed.

    Attributes:
        studies: Deleted studies whose uses of a prior are forgotten.
        versions: Versions that only these studies used.
    """

    studies: list[str]
    versions: list[Version]
