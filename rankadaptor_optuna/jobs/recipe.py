"""Recipe: the definition of a trial, in one dataclass and one TOML file.

A recipe names the model and how it is pruned, the data and settings of a recovery, and the rank space. It is stored
with the study, so a worker on another machine needs only the database and the study's name.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankadaptor_optuna.jobs.old_recipes import FORMAT, upgraded
from rankadaptor_optuna.jobs.output import progress_bar
from rankadaptor_optuna.jobs.settings import CONTINUATION, Data, Evaluation, Pruner, Pruning, Space, validated
from rankadaptor_optuna.llm.adaptable import check_language_model
from rankadaptor_optuna.objective import check_reports
from rankadaptor_optuna.pruning.config import llm_pruner_preset
from rankadaptor_optuna.ranks import LoraSettings, Ranks
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.space import RankSpace

_BUDGET_MARGIN = 0.9  # share of the expected cheapest cost below which a budget is hopeless; set by hand

if TYPE_CHECKING:
    from rankadaptor_optuna.objective import RecoveryObjective
    from rankadaptor_optuna.pruning.core import PrunedModel


@dataclass(frozen=True)
class Parts:
    """Texts or instruction records in three parts that share none.

    Attributes:
        train: Training data.
        validation: Data that trials are scored on.
        report: Data of comparisons, which the search does not see.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    report: Sequence[Any]


@dataclass(frozen=True)
class Recipe:
    """The settings that make two trials comparable.

    Attributes:
        model: Model folder or Hub name, dense or already pruned; ``"embedded"`` is SmolLM2-135M-Instruct.
        dtype: Torch dtype of the frozen model, or ``"auto"``. Default: bfloat16 on a GPU that has it, else float32.
        device: Torch device, such as ``"cpu"`` or ``"cuda:1"``. Default: the GPU if there is one.
        seed: Seed of pruning, data order and initialisation, common to all trials.
        pruning: How a dense model is pruned; unused for a pruned model.
        space: The rank space.
        data: Data of recovery and scoring.
        training: Settings of one recovery.
        lora: Settings of the adapters.
        evaluation: lm-eval tasks, and the score of a trial.
        report_every: Steps between reports to Optuna's pruner. Default: no reports.
        report_items: Whether to report the final evaluation by block or record instead.
        pruner: Optuna's pruner of the trials: ``"median"`` (the default) or ``"hyperband"`` with ``report_every``,
            ``"wilcoxon"`` with ``report_items``.

    Raises:
        ValueError: A value is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    model: str = "embedded"
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    pruning: Pruning = field(default_factory=Pruning)
    space: Space = field(default_factory=Space)
    data: Data = field(default_factory=Data)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    evaluation: Evaluation = field(default_factory=Evaluation)
    report_every: int | None = None
    report_items: bool = False
    pruner: Pruner | None = None

    def __post_init__(self) -> None:
        check_reports(self.report_every, self.report_items, self.evaluation.metric)
        needed = "report_items" if self.pruner == "wilcoxon" else "report_every"
        if self.pruner is not None and not getattr(self, needed):
            raise ValueError(f"pruner {self.pruner!r} compares what {needed} reports; set {needed}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if self.dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be cpu, cuda, cuda:NUMBER or mps, got {self.device!r}.")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recipe:
        """Reads a TOML file; its key ``preset`` names the recipe of ``PRESETS`` that the other keys change.

        Raises:
            ValueError: The file cannot be read, or a key is unknown or its value impossible; the message names it.
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
        """Returns the recipe of nested settings, as TOML or JSON has them, in any format; see ``load``.

        Raises:
            ValueError: A key is unknown or its value impossible; the message names it.
        """
        values = upgraded(values)
        preset = values.pop("preset", "quick")
        if preset not in tuple(PRESETS):
            raise ValueError(f"preset: no recipe named {preset!r}; there are {', '.join(PRESETS)}.")
        settings = upgraded(PRESETS[preset].to_dict())
        for name, value in values.items():
            base = settings.get(name)
            if isinstance(value, Mapping) and isinstance(base, Mapping):
                if value.get("steps") is not None and "epochs" in base:
                    base = {key: setting for key, setting in base.items() if key != "epochs"}
                settings[name] = {**base, **value}
            else:
                settings[name] = value
        training = values.get("training")
        if isinstance(training, Mapping) and None not in (training.get("steps"), training.get("epochs")):
            raise ValueError("training.epochs: give steps or epochs, not both.")
        return validated(cls, settings)

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings and the format's number, for JSON; ``from_dict`` reads them."""
        values = {"format": FORMAT, **asdict(self)}
        del values["training"]["steps" if self.training.epochs else "epochs"]
        return values

    def open_model(self, path: str | PathLike[str] | None) -> tuple[Any, Any]:
        """Loads a model and its tokenizer, with the recipe's dtype and on its device; None is the embedded model.

        Raises:
            ValueError: There is no such model or device.
        """
        from rankadaptor_optuna.recovery.models import load_model

        return load_model(path, self.dtype, self.device)

    def open_dense(self) -> tuple[Any, Any]:
        """Loads the recipe's own model and its tokenizer.

        Raises:
            ValueError: There is no such model or device.
        """
        return self.open_model(None if self.model == "embedded" else self.model)

    def resolved(self) -> Recipe:
        """Returns the recipe with the dtype that this machine chooses."""
        from rankadaptor_optuna.recovery.models import search_dtype

        dtype = self.dtype or str(search_dtype(self.device)).removeprefix("torch.")
        return replace(self, dtype=dtype)

    def prunes(self, model: Any) -> bool:  # noqa: ANN401
        """Returns whether a trial needs this model pruned: it is dense, and the recipe names a pruning method."""
        from rankadaptor_optuna.pruning import profile_of

        return self.pruning.method != "none" and profile_of(model) is None

    def check_space(self, dense: Any) -> None:  # noqa: ANN401
        """Checks that the dense model can be pruned, has the targets, and that its pruned model may fit the budget.

        Raises:
            ValueError: It cannot, has not, or the budget is far below the cheapest configuration.
        """
        from rankadaptor_optuna.pruning.checkpoint import check_prunable

        check_language_model(dense)
        check_prunable(dense, self.pruning.method)
        space = self._space_of(dense, budget=None)
        rank, budget = space.candidates[0], str(self.space.budget)
        limit = math.inf if budget.startswith("uniform:") else float(budget)
        # pruning takes no larger share of the cost per rank, in + out, than of the parameters, in x out
        cheapest = (1 - self.pruning.ratio) * space.cost(Ranks.uniform(space.modules, rank))
        if limit < _BUDGET_MARGIN * cheapest:
            raise ValueError(
                f"space.budget {limit:,.0f} is below the cheapest configuration: rank {rank} in every layer of the "
                f"pruned model costs about {cheapest:,.0f}. Raise the budget or add a smaller candidate."
            )

    def prune(self, dense: Any, tokenizer: Any) -> PrunedModel:  # noqa: ANN401
        """Prunes a dense model as the recipe says, with a progress bar.

        Raises:
            ValueError: It cannot be pruned with these options.
        """
        from rankadaptor_optuna.pruning import prune

        options = {name: value for name, value in asdict(self.pruning).items() if value is not None}
        with progress_bar("prune") as progress:
            return prune(dense, tokenizer, progress=progress, **({"seed": self.seed} | options))

    def _space_of(self, model: Any, budget: float | str | None) -> RankSpace:  # noqa: ANN401
        return RankSpace.from_model(
            model,
            self.space.candidates,
            budget,
            unpruned_rank=None if self.space.unpruned_rank < 0 else self.space.unpruned_rank,
            targets=self.lora.targets,
            granularity=self.space.granularity,
        )

    def objective(self, model: Any, tokenizer: Any, **settings: Any) -> RecoveryObjective:  # noqa: ANN401
        """Returns the trial objective on a pruned model; ``settings`` are further arguments of ``RecoveryObjective``.

        Raises:
            ValueError: The data or a task cannot be read, or is too short.
        """
        from rankadaptor_optuna.objective import RecoveryObjective

        if "train" not in settings:
            parts = self.read_data()
            settings |= {"train": parts.train, "validation": parts.validation}
        if "tasks" not in settings:
            settings |= {"tasks": self.evaluation.suite(tokenizer, "search"), "metric": self.evaluation.metric}
        space = self._space_of(model, self.space.budget)
        return RecoveryObjective(
            model,
            tokenizer,
            space,
            training=self.training,
            block_length=self.data.block_length,
            validation_blocks=self.data.validation_blocks,
            mask_prompt=self.data.mask_prompt,
            targets=space.targets,
            alpha_ratio=self.lora.alpha_ratio,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            report_every=self.report_every,
            report_items=self.report_items,
            seed=self.seed,
            **settings,
        )

    def read_data(self) -> Parts:
        """Reads the texts or instruction records of the three parts.

        Raises:
            ValueError: A part cannot be read, is empty, or is mostly a copy of another.
        """
        from rankadaptor_optuna.llm.texts import load_texts, read_records

        if self.data.train is None:
            texts = load_texts()
            parts = Parts(texts.train, texts.validation, texts.report)
        else:
            named = {8: self.data.report, 9: self.data.validation}
            at_least = 10 if None in named.values() else 1
            records = read_records(self.data.train, limit=self.data.limit, at_least=at_least)
            held = {tenth for tenth, name in named.items() if name is None}
            train = [record for i, record in enumerate(records) if i % 10 not in held]
            parts = Parts(train, records[9::10], records[8::10])
        for name in ("validation", "report"):
            if (source := getattr(self.data, name)) is not None:
                parts = replace(parts, **{name: read_records(source, limit=self.data.limit)})
            if not getattr(parts, name):
                raise ValueError(f"data.{name}: too few records to keep every tenth for it; name other data.")
        _check_disjoint(parts, [name for name in ("validation", "report") if getattr(self.data, name) is not None])
        return parts


def _check_disjoint(parts: Parts, named: Sequence[str]) -> None:
    """Warns of named parts that share records with another part.

    Raises:
        ValueError: Most of a named part's records are in another part.
    """
    keys = {name: [json.dumps(record, sort_keys=True) for record in part] for name, part in vars(parts).items()}
    for name, other in itertools.product(named, keys):
        there = set(keys[other])
        shared = sum(key in there for key in keys[name]) if name != other else 0
        said = f"{shared:,} of the {len(keys[name]):,} records of data.{name} are in the {other} data too"
        if shared > len(keys[name]) / 2:
            raise ValueError(f"{said}: a score on these is no score on unseen data; name other data.")
        if shared:
            warnings.warn(f"{said}.", stacklevel=3)


PRESETS = {
    "quick": Recipe(),
    "quickstart": Recipe(
        data=Data(report_blocks=24), evaluation=Evaluation(report_tasks=(CONTINUATION,), report_limit=60)
    ),
    # LLM-Pruner's published recovery (post_training.py): alpha 16, two epochs of alpaca-cleaned with the prompt masked;
    # and the seven tasks, candidates and budget of RankAdaptor
    "paper": Recipe(
        model="baffo32/decapoda-research-llama-7B-hf",
        pruning=Pruning(**llm_pruner_preset(32)),
        data=Data(train="yahma/alpaca-cleaned", block_length=256, validation_blocks=2000, limit=100_000),
        training=TrainingConfig(
            epochs=2,
            batch_size=64,
            micro_batch_size=4,
            learning_rate=1e-4,
            warmup=100,
            linear_decay=True,
        ),
        lora=LoraSettings(alpha=16, dropout=0.05),
        evaluation=Evaluation(
            ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), "accuracy"
        ),
    ),
}


def comparable(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a stored recipe in the current format, with all settings, to compare with ``Recipe.resolved``.

    It has the device of ``now``, which changes no score, and its dtype where an earlier version left the choice to the
    machine. Settings that are no recipe are unchanged.

    Raises:
        ValueError: A newer version wrote the recipe.
    """
    settings = upgraded(stored)
    try:
        settings = Recipe.from_dict(settings).to_dict()
    except ValueError:
        return settings
    return {**settings, "device": now["device"], "dtype": settings["dtype"] or now["dtype"]}
