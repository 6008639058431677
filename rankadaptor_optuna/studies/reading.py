"""StudyReading: a study's trials and settings, read from its storage once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from rankadaptor_optuna.attributes import SPACE_ATTR, recipe_of
from rankadaptor_optuna.plain_text import one_line
from rankadaptor_optuna.ranks import LoraSettings, Module, Ranks
from rankadaptor_optuna.sampling.encoding import Encoding, rank_parameters
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.sampling.trials import has_finite_values, verification_seed
from rankadaptor_optuna.space import RankSpace


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
        space: The rank space. Default: the sampler's, else the space stored with the study. Without any, ranks are
            recognised by the parameters' names and ranges, and there is no budget.

    Attributes:
        study: The study.
        space: The rank space, or None.
        recipe: The recipe stored with the study; empty where it has none.
        trials: Trials of the search in any state, by number; no verification trials.
        verification_trials: Verification trials in any state, by number.
        history: The trials of the search, for encoding.
    """

    def __init__(self, study: Study, space: RankSpace | None = None) -> None:
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        self.study = study
        self.space = space or study_space(study)
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
        return self.space.names if self.space is not None else {**rank_parameters(self.history.searched)}

    @cached_property
    def encoding(self) -> Encoding:
        """The search space as numbers."""
        searched = self.history.searched
        if self.space is not None:
            searched |= self.space.distributions()
        return Encoding(searched, self.space, self.history.sensitivity)

    @cached_property
    def finished_trials(self) -> list[FrozenTrial]:
        """Completed trials of the search with finite scores and all rank parameters, by number."""
        return [t for t in self.trials if has_finite_values(t) and self.rank_names.keys() <= t.params.keys()]

    @cached_property
    def uniform_trials(self) -> list[FrozenTrial]:
        """Finished trials of the uniform configuration, the study's own LoRA reference; none without a space."""
        if self.space is None:
            return []
        uniform = self.space.to_params(self.space.uniform())
        return [t for t in self.finished_trials if uniform.items() <= t.params.items()]

    def ranks(self, params: Mapping[str, Any]) -> Ranks:
        """Returns the rank configuration in a trial's parameters.

        It is empty where no space is known and several rank parameters belong to one layer.
        """
        ranks = Ranks({module: params[name] for name, module in self.rank_names.items()})
        return ranks if len(ranks) == len(self.rank_names) else Ranks()
