"""Inputs: the data and the model of a recipe, checked before anything slow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.llm.texts import read_texts
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.recovery.data import Examples, examples_of
from rankadaptor_optuna.recovery.models import check_inputs

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.core import PrunedModel

OnPruned = Callable[[Any, Any, "PrunedModel | None"], None]


class Inputs:
    """The data and the model of a recipe, read and checked; nothing is pruned before ``objective``.

    Args:
        recipe: The definition of a trial.
        pruned: Folder of the pruned model. Default: the recipe's own model, pruned by ``objective`` if it is dense.

    Attributes:
        parts: Texts or records of training, validation and report.
        model: The model as it was loaded.
        tokenizer: Its tokenizer.
        train: Training examples.
        held_out: Examples that trials are scored on.
        training: Settings of a recovery, in steps.
        pruned: The result of pruning; None if nothing was pruned.

    Raises:
        ValueError: The data or the model cannot be read, the data is too short, a target is no linear module of the
            layers, or the model cannot be pruned.
    """

    def __init__(self, recipe: Recipe, pruned: Path | None = None) -> None:
        self._recipe = recipe
        self.parts = recipe.read_data()
        self.model, self.tokenizer = recipe.open_model(pruned) if pruned else recipe.open_dense()
        self.pruned: PrunedModel | None = None
        self._prunes = pruned is None and recipe.prunes(self.model)
        if self._prunes:
            recipe.check_space(self.model)
        self.train = self.examples(self.parts.train)
        self.held_out = self.examples(self.parts.validation, recipe.data.validation_blocks)
        self.training = recipe.training.for_examples(len(self.train))

    def examples(self, data: Sequence[Any], limit: int | None = None) -> Examples:
        """Returns data as token sequences, as the recipe says; ``limit`` is the most blocks or records.

        Raises:
            ValueError: The data is too short, or the model does not take its tokens or its length.
        """
        settings = self._recipe.data
        read = partial(examples_of, self.tokenizer, length=settings.block_length, mask_prompt=settings.mask_prompt)
        found = read(data, limit=limit)
        check_inputs(self.model, found)
        return found

    def digests(self) -> dict[str, str]:
        """Returns digests of what trials depend on beside the recipe: data and, for a dense model, calibration text."""
        found = {"data": digest(self.train, self.held_out)}
        if self._prunes:
            found["calibration"] = _digest(text.encode() for text in read_texts(self._recipe.pruning.calibration))
        return found

    def objective(self, on_pruned: OnPruned | None = None, **settings: Any) -> RecoveryObjective:  # noqa: ANN401
        """Prunes the model if it is dense, and returns the trial objective.

        Args:
            on_pruned: Called with the pruned model, the tokenizer and the result of pruning (None for a model that was
                pruned already), before anything else may fail.
            **settings: Further arguments of ``RecoveryObjective``.

        Raises:
            ValueError: The model cannot be pruned with these options, or the budget is below every configuration.
        """
        if self._prunes:
            self.pruned = self._recipe.prune(self.model, self.tokenizer)
            self.model = self.pruned.model.to(self.model.device)
            self._prunes = False
        if on_pruned is not None:
            on_pruned(self.model, self.tokenizer, self.pruned)
        data = {"train": self.train, "validation": self.held_out}
        return self._recipe.objective(self.model, self.tokenizer, **data, **settings)


def digest(*parts: Examples) -> str:
    """Returns a digest of token sequences and their labels."""
    sequences = [ids for part in parts for pair in (part.ids, part.labels) for ids in pair]
    return _digest(ids.numpy().tobytes() for ids in sequences)


def _digest(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big"))
        sha.update(part)
    return sha.hexdigest()[:16]
