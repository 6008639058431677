"""StudyReading: a study's trials and settings, read from its storage once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.attributes import SPACE_ATTR, ranks_of, recipe_of
from rankadaptor_optuna.ranks import LoraSettings, Module, Ranks
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.sampling.rank_parameters import (
    checked_templates,
    modules_of_ranks,
    rank_parameters,
    why_no_ranks,
)
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.sampling.trials import has_finite_values, verification_seed
from rankadaptor_optuna.space import RankSpace

_STATES = {
    TrialState.COMPLETE: "completed with an infinite score",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def study_space(study: Study) -> RankSpace | None:
    """Returns the rank space of a study: its sampler's, else the space stored with it, else None."""
    sampler = getattr(study, "sampler", None)
    if isinstance(sampler, RankAdaptorSampler) and sampler.space is not None:
        return sampler.space
    stored = study.user_attrs.get(SPACE_ATTR)
    try:
        return None if stored is None else RankSpace.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"the rank space stored with study {study.study_name!r}: {one_line(error)}") from None


class StudyReading:
    """A study as of one moment: all its trials, read from the storage once.

    Args:
        study: A study in any storage; any sampler may have made its trials.
        space: The rank space. Default: the sampler's, else the space stored with the study. Without any there is no
            budget.
        ranks: Templates of the rank parameters' names where there is no space, see ``RankAdaptorSampler``. Default:
            those stored with the study; without any, ranks are recognised by their names and ranges.

    Attributes:
        study: The study.
        space: The rank space, or None.
        declared: Templates of the rank parameters' names; None where none were declared.
        recipe: The recipe stored with the study; empty where it has none.
        trials: Trials of the search in any state, by number; no verification trials.
        verification_trials: Verification trials in any state, by number.
        history: The trials of the search, for encoding.
    """

    def __init__(self, study: Study, space: RankSpace | None = None, ranks: str | Sequence[str] | None = None) -> None:
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        self.study = study
        self.space = space or study_space(study)
        self.declared = checked_templates(ranks_of(study.user_attrs) if ranks is None else ranks)
        self.recipe = recipe_of(study.user_attrs) or {}
        self.trials = [t for t in trials if verification_seed(t) is None]
        self.verification_trials = [t for t in trials if verification_seed(t) is not None]
        self.history = History(study)
        self.history.read(trials)

    @property
    def sign(self) -> float:
        """1 where a higher score is better, else -1; for a study with one objective."""
        return 1.0 if self.study.direction is StudyDirection.MAXIMIZE else -1.0

    @property
    def lora(self) -> LoraSettings:
        """The adapters' settings beside their ranks: those of the recipe, else the defaults; the space's targets."""
        settings = LoraSettings.of(self.recipe.get("lora", {}))
        targets = None if self.space is None else self.space.targets
        return settings if targets is None else replace(settings, targets=targets)

    @cached_property
    def rank_names(self) -> dict[str, Module]:
        """The rank parameters in depth order, ``{name: module}``; empty where the study has none."""
        if self.space is not None:
            return dict(self.space.names)
        return modules_of_ranks(rank_parameters(self.searched, self.declared))

    @cached_property
    def searched(self) -> dict[str, BaseDistribution]:
        """The search space: ranks, and the parameters modelled with them, see ``History.search_space``."""
        return self.history.search_space(self.space, self.declared)

    @cached_property
    def encoding(self) -> Encoding:
        """The search space as numbers."""
        return Encoding(self.searched, self.space, self.history.sensitivity, self.declared)

    @cached_property
    def finished_trials(self) -> list[FrozenTrial]:
        """Completed trials of the search with finite scores and all rank parameters, by number."""
        return [t for t in self.trials if has_finite_values(t) and self.rank_names.keys() <= t.params.keys()]

    def check_ranks(self) -> None:
        """Checks that some trial has finished with a score and all rank parameters.

        Raises:
            ValueError: None has; the message says what the study has instead.
        """
        if self.finished_trials and self.rank_names:
            return
        name, scored = f"study {self.study.study_name!r}", [t for t in self.trials if has_finite_values(t)]
        if not self.trials:
            raise ValueError(f"{name} has no trials yet; run some first.")
        if not scored:
            counts = Counter(_STATES[t.state] for t in self.trials)
            states = ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
            raise ValueError(f"{name} has no completed trial with a finite score yet: {states}.")
        has = ", ".join(sorted(scored[-1].params)[:4]) or "none"
        if self.space is None and not self.rank_names:
            why = (
                'names of ranks contain a layer number and "rank"; declare others by ranks=..., like ranks="layer_{}_r"'
            )
            why = why_no_ranks(self.history.distributions, self.declared) or why
            raise ValueError(f"{name} has no rank parameters; its trials have: {has}, ...; {why}.")
        expected = ", ".join(list(self.rank_names)[:2])
        raise ValueError(
            f"{name} has no completed trial with all ranks ({expected}, ...): its trials have {has}, ... Give the "
            'space their names: RankSpace(..., name="layer_{}_rank").'
        )

    @cached_property
    def uniform_trials(self) -> list[FrozenTrial]:
        """Finished trials of the uniform configuration, the study's own LoRA reference; none without a space."""
        if self.space is None:
            return []
        uniform = self.space.to_params(self.space.uniform())
        return [t for t in self.finished_trials if uniform.items() <= t.params.items()]

    def ranks(self, params: Mapping[str, Any]) -> Ranks:
        """Returns the rank configuration in a trial's parameters.

        It is empty where no space is known and the names of the parameters do not say which modules have their ranks.
        """
        if self.space is None and list(self.rank_names) == list(self.rank_names.values()):
            return Ranks()
        return Ranks({module: params[name] for name, module in self.rank_names.items()})
