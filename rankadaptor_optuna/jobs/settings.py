"""The sections of a recipe, and how nested settings are read from the values of a file."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from rankadaptor_optuna.pruning.config import PruningConfig
from rankadaptor_optuna.recovery.tasks import Metric, Part, TaskSuite
from rankadaptor_optuna.space import Granularity, RankSpace, checked_candidates

T = TypeVar("T")


@dataclass(frozen=True)
class Pruning(PruningConfig):
    """How the model is pruned: the options of `PruningConfig`, and the recipe's own.

    Attributes:
        method: `"none"`, too: takes the model as it is, such as a model that another tool pruned by whole blocks and
            that looks like a dense one.
        seed: Default: the recipe's seed.
        calibration: Text or JSONL file, or Hub data set. Default: the embedded text.
    """

    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.method != "none":
            super().__post_init__()


@dataclass(frozen=True)
class Space:
    """What is searched: see ``RankSpace.from_model``.

    Attributes:
        candidates: Ranks that a layer may take.
        budget: ``"uniform:RANK"``, or trainable parameters.
        unpruned_rank: Rank of layers from which pruning took nothing; -1 searches them too.
        granularity: ``"layer"`` or ``"sublayer"``.
    """

    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str | float = "uniform:8"
    unpruned_rank: int = 8
    granularity: Granularity = "layer"

    def __post_init__(self) -> None:
        checked_candidates(self.candidates)
        RankSpace(1, self.candidates, self.budget, granularity=self.granularity)


@dataclass(frozen=True)
class Data:
    """What the model recovers on and is scored on.

    Attributes:
        train: Text file, JSONL file or Hub data set (``texts.read_records``). Default: the embedded text.
        validation: The same, for the score; must not share records with ``train``. Default: of the embedded text its
            validation part, of anything else every tenth record.
        report: The same, for comparisons after the search, which must see neither. Default: likewise.
        block_length: Tokens of a block of text; of an instruction record at most.
        validation_blocks: Blocks or records that a trial is scored on.
        mask_prompt: Whether of instruction records the response alone counts.
        limit: At most so many records are read.
    """

    train: str | None = None
    validation: str | None = None
    report: str | None = None
    block_length: int = 256
    validation_blocks: int = 12
    mask_prompt: bool = True
    limit: int = 50_000

    def __post_init__(self) -> None:
        for name in ("block_length", "validation_blocks", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Evaluation:
    """lm-eval tasks that a trial is evaluated on, and what its score is.

    A trial sees one half of each task's documents, comparisons after the search the other one.

    Attributes:
        tasks: lm-eval task, group or tag names; with weights, ``{name: weight}``. Default: none.
        metric: What a study optimises: ``"loss"``, the held-out loss; ``"margin"`` or ``"accuracy"``, the weighted mean
            over the tasks (see ``TaskScore``). Whatever it is, the others are recorded beside it.
        limit: At most so many items of each task for a trial.
        report_limit: At most so many items of each task for comparisons after the search.
        num_fewshot: Examples before each item. Default: the task's own.
        include_path: Folder of further task YAML files.
        batch_size: Requests per forward pass.
    """

    tasks: tuple[str, ...] | dict[str, float] = ()
    metric: Metric = "loss"
    limit: int | None = None
    report_limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("report_limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if isinstance(self.tasks, dict) and not all(weight > 0 for weight in self.tasks.values()):
            raise ValueError(f"tasks must have positive weights, got {self.tasks}.")
        if self.metric != "loss" and not self.tasks:
            raise ValueError(f"metric {self.metric!r} needs tasks to measure it on; name some.")

    def suite(self, tokenizer: Any, part: Part, **changes: Any) -> TaskSuite | None:  # noqa: ANN401
        """The tasks, made into requests; None without any. ``changes`` are other settings than these.

        Raises:
            ValueError: A task is unknown, or its data cannot be had.
        """
        settings = {
            "tasks": self.tasks,
            "limit": self.limit if part == "search" else self.report_limit,
            "num_fewshot": self.num_fewshot,
            "include_path": self.include_path,
            "batch_size": self.batch_size,
            **changes,
        }
        return TaskSuite(tokenizer, part=part, **settings) if settings["tasks"] else None


Pruner = Literal["median", "hyperband", "wilcoxon"]


def changed(base: T, values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass with some fields changed, nested ones in part.

    Args:
        base: What is not named stays as it is here.
        values: As TOML or JSON has them; lists become tuples.
        path: Where ``base`` stands in a larger one, for messages: ``"training."``.

    Raises:
        ValueError: A key is unknown or its value impossible; the message names it.
    """
    hints = typing.get_type_hints(type(base))
    known = [f.name for f in fields(base)]  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}{name}: no such setting; there are {', '.join(known)}.")
        old = getattr(base, name)
        if is_dataclass(old) and not isinstance(old, type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}{name}: expected a table of settings, got {value!r}.")
            changes[name] = changed(old, value, f"{path}{name}.")
            continue
        changes[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(changes[name], hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            raise ValueError(f"{path}{name}: expected {wanted.replace('typing.', '')}, got {value!r}.")
    try:
        return replace(base, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def _fits(value: Any, hint: Any) -> bool:  # noqa: ANN401
    """Whether a value is of an annotated type; an integer is a float too, a boolean neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
