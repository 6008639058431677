"""Recipe: what a trial is, in one dataclass and one TOML file.

A recipe says which model is pruned how, on which text it recovers, with which settings, and within which budget ranks
are searched. It is stored with the study: a worker elsewhere needs nothing but the database and the study's name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankadaptor_optuna.recovery.lora import ALPHA_RATIO, TARGETS
from rankadaptor_optuna.recovery.tasks import Metric, Part, TaskSuite
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.settings import changed
from rankadaptor_optuna.space import Granularity, RankSpace, checked_candidates

if TYPE_CHECKING:
    from rankadaptor_optuna.objective import RecoveryObjective
    from rankadaptor_optuna.pruning.core import PrunedModel


@dataclass(frozen=True)
class Pruning:
    """How the model is pruned: arguments of ``pruning.prune``; None leaves the method's own default.

    Attributes:
        method: ``"llm-pruner"``, ``"shortened"`` or ``"slimgpt"``.
        ratio: Share of the transformer blocks' parameters to remove.
        calibration: Text or JSONL file, or Hub data set. Default: the embedded text.
        criterion: Importance criterion.
        ranking: ``"global"`` or ``"local"``.
        structure: ``"units"`` or ``"hidden"``.
        steps: Steps to the ratio.
        keep_first: Layers at the start that stay whole.
        keep_last: Layers at the end that stay whole.
        multiple_of: Of MLP widths.
        n_samples: Calibration windows.
        sample_length: Tokens of each.
    """

    method: str = "llm-pruner"
    ratio: float = 0.25
    calibration: str | None = None
    criterion: str | None = None
    ranking: str | None = None
    structure: str | None = None
    steps: int | None = None
    keep_first: int | None = None
    keep_last: int | None = None
    multiple_of: int | None = None
    n_samples: int | None = None
    sample_length: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}.")


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
class Parts:
    """Texts or instruction records, none of which is in two parts.

    Attributes:
        train: To train on.
        validation: To score trials on.
        report: To report on, which no search sees.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    report: Sequence[Any]


@dataclass(frozen=True)
class Lora:
    """The adapters.

    Attributes:
        targets: Names of the adapted modules.
        alpha_ratio: Alpha as a multiple of each layer's rank, so that all ranks are scaled alike.
        dropout: Dropout before the adapters.
    """

    targets: tuple[str, ...] = TARGETS
    alpha_ratio: float = ALPHA_RATIO
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")


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


@dataclass(frozen=True)
class Recipe:
    """What makes two trials comparable.

    Attributes:
        model: Model folder or Hub name, dense or already pruned; ``"embedded"`` is SmolLM2-135M-Instruct.
        dtype: Torch dtype of the frozen model, or ``"auto"``. Default: bfloat16 on a GPU that has it, else float32.
        seed: Of pruning, data order and initialisation, common to all trials.
        pruning: How a dense model is pruned; not used for one that is pruned.
        space: What is searched.
        data: What it recovers on.
        training: Settings of one recovery.
        lora: The adapters.
        evaluation: lm-eval tasks, and what is optimised.
        report_every: Steps between reports to Optuna's pruner. Default: none.

    Raises:
        ValueError: A value is out of range.
    """

    model: str = "embedded"
    dtype: str | None = None
    seed: int = 0
    pruning: Pruning = field(default_factory=Pruning)
    space: Space = field(default_factory=Space)
    data: Data = field(default_factory=Data)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: Lora = field(default_factory=Lora)
    evaluation: Evaluation = field(default_factory=Evaluation)
    report_every: int | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if self.dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recipe:
        """Reads a TOML file; a key ``preset`` names the recipe of ``PRESETS`` that its other keys change.

        Raises:
            ValueError: The file cannot be read, or the message names a key that is unknown or has an impossible value.
        """
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"cannot read the recipe {path}: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of nested values, as TOML or JSON has them; see ``load``.

        Raises:
            ValueError: A key is unknown or its value impossible; the message names it.
        """
        values = dict(values)
        preset = values.pop("preset", "quick")
        if preset not in PRESETS:
            raise ValueError(f"preset: no recipe named {preset!r}; there are {', '.join(PRESETS)}.")
        return changed(PRESETS[preset], values, "")

    def to_dict(self) -> dict[str, Any]:
        """All settings, for JSON; ``from_dict`` reads them."""
        return asdict(self)

    def read_model(self) -> tuple[Any, Any, PrunedModel | None]:
        """Loads the model and, if it is dense, prunes it.

        Returns:
            (pruned model, tokenizer, what pruning did; None where the model was pruned already).

        Raises:
            ValueError: There is no such model, or it cannot be pruned so.
        """
        from rankadaptor_optuna.embedded import load_model
        from rankadaptor_optuna.pruning import profile_of, prune

        model, tokenizer = load_model(None if self.model == "embedded" else self.model, self.dtype)
        if profile_of(model) is not None:
            return model, tokenizer, None
        options = {name: value for name, value in asdict(self.pruning).items() if value is not None}
        pruned = prune(model, tokenizer, seed=self.seed, **options)
        return pruned.model.to(model.device), tokenizer, pruned

    def objective(self, model: Any, tokenizer: Any, **settings: Any) -> RecoveryObjective:  # noqa: ANN401
        """The trial objective of this recipe on a pruned model; ``settings`` go to ``RecoveryObjective`` as they are.

        Raises:
            ValueError: The data or a task cannot be read, or is too short.
        """
        from rankadaptor_optuna.objective import RecoveryObjective

        parts = self.read_data()
        if "tasks" not in settings:
            settings |= {"tasks": self.evaluation.suite(tokenizer, "search"), "metric": self.evaluation.metric}
        space = RankSpace.from_model(
            model,
            self.space.candidates,
            self.space.budget,
            unpruned_rank=None if self.space.unpruned_rank < 0 else self.space.unpruned_rank,
            targets=self.lora.targets,
            granularity=self.space.granularity,
        )
        return RecoveryObjective(
            model,
            tokenizer,
            space,
            train=parts.train,
            validation=parts.validation,
            training=self.training,
            block_length=self.data.block_length,
            validation_blocks=self.data.validation_blocks,
            mask_prompt=self.data.mask_prompt,
            targets=self.lora.targets,
            alpha_ratio=self.lora.alpha_ratio,
            dropout=self.lora.dropout,
            report_every=self.report_every,
            seed=self.seed,
            **settings,
        )

    def read_data(self) -> Parts:
        """Texts or instruction records to train on, to score trials on, and to report on.

        Raises:
            ValueError: They cannot be read.
        """
        from rankadaptor_optuna.texts import load_texts, read_records

        if self.data.train is None:
            texts = load_texts()
            parts = Parts(texts.train, texts.validation, texts.report)
        else:
            records = read_records(self.data.train, limit=self.data.limit)
            named = {8: self.data.report, 9: self.data.validation}
            held = {tenth for tenth, name in named.items() if name is None}
            train = [record for i, record in enumerate(records) if i % 10 not in held]
            parts = Parts(train, records[9::10], records[8::10])
        for name in ("validation", "report"):
            if (source := getattr(self.data, name)) is not None:
                parts = replace(parts, **{name: read_records(source, limit=self.data.limit)})
            if not getattr(parts, name):
                raise ValueError(f"data.{name}: too few records to keep every tenth for it; name other data.")
        return parts


PRESETS = {
    "quick": Recipe(),
    # LLM-Pruner's published recovery: alpaca-cleaned, prompt masked, rank 8, alpha 16, 2 epochs of batch 64
    "paper": Recipe(
        model="baffo32/decapoda-research-llama-7B-hf",
        pruning=Pruning(ratio=0.2),
        data=Data(train="yahma/alpaca-cleaned", block_length=256, validation_blocks=2000),
        training=TrainingConfig(steps=1550, batch_size=64, learning_rate=1e-4, warmup=100 / 1550, micro_batch_size=4),
        lora=Lora(dropout=0.05),
    ),
}
