"""The sections of a recipe, and the validation of settings from TOML or JSON."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from rankadaptor_optuna.checks.extras import require
from rankadaptor_optuna.pruning.config import PruningConfig
from rankadaptor_optuna.recovery.tasks import Metric, Part, TaskSuite, continuation_items, continuation_task
from rankadaptor_optuna.space import Granularity, RankSpace, checked_candidates

T = TypeVar("T")
Pruner = Literal["median", "hyperband", "wilcoxon"]
CONTINUATION = "continuation"
_CONTINUATION_ITEMS = 60  # set by hand: a standard error of 6 points in half a minute on two cores


@dataclass(frozen=True)
class Pruning(PruningConfig):
    """How the model is pruned: the options of ``PruningConfig``, and the recipe's own.

    Attributes:
        method: ``"none"``, too: takes the model as it is, such as a model that another tool pruned by whole blocks and
            that looks like a dense one.
        seed: Default: the recipe's seed.
        calibration: File or Hub data set, as for ``data.train``. Default: the embedded text.
    """

    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.method != "none":
            super().__post_init__()


@dataclass(frozen=True)
class Space:
    """The rank space; see ``RankSpace.from_model``.

    Attributes:
        candidates: Ranks that a layer may take.
        budget: ``"uniform:RANK"``, or a number of trainable parameters.
        unpruned_rank: Rank of the layers from which pruning removed nothing; -1 searches them too.
        granularity: ``"layer"`` or ``"sublayer"``.
    """

    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str | float = "uniform:8"
    unpruned_rank: int = 8
    granularity: Granularity = "layer"

    def __post_init__(self) -> None:
        checked_candidates(self.candidates)
        RankSpace(1, self.candidates, self.budget, granularity=self.granularity)
        if self.unpruned_rank < -1:
            raise ValueError(
                f"unpruned_rank must be at least 0, or -1 to search these layers, got {self.unpruned_rank}."
            )


@dataclass(frozen=True)
class Data:
    """Data of recovery and scoring.

    Attributes:
        train: Training data: a file of text, JSON, JSONL, CSV, Parquet or Arrow, or a Hub data set, with texts,
            instructions or conversations (``texts.read_records``). Default: the embedded text.
        validation: Data that trials are scored on; must not share records with ``train``. Default: the validation part
            of the embedded text, or every tenth record of ``train``.
        report: Data of comparisons after the search; must not share records with the others. Default: as for
            ``validation``.
        block_length: Tokens of a block of text; most tokens of an instruction record.
        validation_blocks: Number of blocks or records that a trial is scored on.
        report_blocks: Most blocks or records that a comparison uses. Default: all.
        mask_prompt: Whether only the response of an instruction record counts.
        limit: Most records to read.
    """

    train: str | None = None
    validation: str | None = None
    report: str | None = None
    block_length: int = 256
    validation_blocks: int = 12
    report_blocks: int | None = None
    mask_prompt: bool = True
    limit: int = 50_000

    def __post_init__(self) -> None:
        for name, least in (("block_length", 2), ("validation_blocks", 1), ("report_blocks", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")


@dataclass(frozen=True)
class Evaluation:
    """lm-eval tasks, and the score of a trial.

    Trials are evaluated on one half of each task's documents, comparisons after the search on the other half.

    Attributes:
        tasks: lm-eval task, group or tag names; with weights, ``{name: weight}``. Default: none.
        metric: Score that a study optimises: ``"loss"`` on the validation data, or ``"margin"`` or ``"accuracy"``,
            weighted means over the tasks (see ``TaskScore``). The other two are recorded beside it.
        limit: Most items of each task per trial. Default: all.
        report_tasks: lm-eval tasks of comparisons, instead of ``tasks``; ``"continuation"`` is a four-way choice of the
            next words of a passage of the report text. Default: ``tasks``.
        report_limit: Most items of each task in comparisons. Default: all.
        num_fewshot: Examples before each item. Default: the task's own.
        include_path: Folder of further task YAML files.
        batch_size: Requests per forward pass.
    """

    tasks: tuple[str, ...] | dict[str, float] = ()
    metric: Metric = "loss"
    limit: int | None = None
    report_tasks: tuple[str, ...] = ()
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

    def for_report(
        self, tasks: Sequence[str] = (), include_path: str | None = None, limit: int | None = None
    ) -> Evaluation:
        """Returns the evaluation of a comparison; arguments replace the settings.

        The metric is the searched one on the search's tasks, else the loss.
        """
        named = tuple(tasks) or self.report_tasks
        return replace(
            self,
            tasks=named or self.tasks,
            metric="loss" if named else self.metric,
            limit=self.report_limit if limit is None else limit,
            include_path=include_path or self.include_path,
        )

    def suite(self, tokenizer: Any, part: Part, report: Sequence[Any] = ()) -> TaskSuite | None:  # noqa: ANN401
        """Returns the tasks as requests; None without tasks.

        Args:
            tokenizer: Tokenizer of the model.
            part: Half of each task's documents.
            report: Text that items of ``"continuation"`` are made of.

        Raises:
            ValueError: A task is unknown, or its data cannot be read.
        """
        if not self.tasks:
            return None
        tasks: Any = self.tasks
        if part == "report" and CONTINUATION in tasks:
            if not all(isinstance(text, str) for text in report):
                raise ValueError(f"task {CONTINUATION!r} needs text to report on, not instruction records.")
            items = continuation_items(report, 2 * (self.limit or _CONTINUATION_ITEMS))  # the suite keeps one half
            tasks = [continuation_task(items) if name == CONTINUATION else name for name in tasks]
        return TaskSuite(
            tokenizer,
            tasks,
            part=part,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            include_path=self.include_path,
            batch_size=self.batch_size,
        )


def validated(kind: type[T], values: Mapping[str, Any]) -> T:
    """Returns the dataclass of nested settings, as TOML or JSON has them; lists become tuples.

    Types are strict: a boolean is no integer, a string no number.

    Args:
        kind: A dataclass with ``__pydantic_config__``, whose sections are dataclasses with defaults.
        values: Settings by key; sections are mappings.

    Raises:
        ValueError: A key is unknown or its value impossible; the message names it.
        ImportError: pydantic is missing.
    """
    require("pydantic")
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ValueError(_first_error(kind, values, error.errors())) from None


def _first_error(kind: type[Any], values: Any, errors: Sequence[Any]) -> str:  # noqa: ANN401
    """Returns pydantic's first error in one line."""
    path = errors[0]["loc"][:2]  # section and key; below these come items of a tuple and branches of a union
    same = [error for error in errors if error["loc"][:2] == path]
    where = ".".join(map(str, path))
    if errors[0]["type"] == "value_error":
        return f"{where}{'.' if where else ''}{errors[0]['ctx']['error']}"
    if errors[0]["type"] == "unexpected_keyword_argument":
        section = typing.get_type_hints(kind)[path[0]] if len(path) > 1 else kind
        return f"{where}: no such setting; there are {', '.join(field.name for field in fields(section))}."
    for key in path:
        values = values[key]
    expected = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in same)
    return f"{where}: expected {' or '.join(expected)}, got {values!r}."
