"""The main job end to end: prune, search ranks, recommend, recover, report; resumable at every step."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study

from rankadaptor_optuna.jobs.output import Results, bar, check_output_folder, write_text
from rankadaptor_optuna.jobs.search import open_shared, run_trials
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.pruning.checkpoint import check_prunable
from rankadaptor_optuna.recovery.data import token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.models import load_model, quiet, search_dtype
from rankadaptor_optuna.recovery.tasks import TaskSuite, continuation_items, continuation_task
from rankadaptor_optuna.recovery.train import TrainingConfig
from rankadaptor_optuna.sampling.sampler import RankAdaptorSampler
from rankadaptor_optuna.space import Granularity, RankSpace, checked_candidates
from rankadaptor_optuna.studies.recommendation import Recommendation, recommend
from rankadaptor_optuna.studies.storage import create_study, masked
from rankadaptor_optuna.texts import Texts, load_texts

N_REPORT_SEEDS = 3
_BLOCK = 256
_REPORT_BLOCKS = 24
_VALIDATION_BLOCKS = 12
_ITEMS = 60


@dataclass(frozen=True)
class Quickstart:
    """Settings of one quickstart.

    Attributes:
        out: Folder for everything that it writes.
        trials: Finished trials to reach, the uniform one included.
        seed: Seed of pruning, search and the trials' common data order and initialisation.
        model: Model folder or Hub name. Default: the embedded model.
        ratio: Share of the transformer blocks' parameters that pruning removes, in (0, 1).
        candidates: Ranks that a layer may take.
        budget: See ``RankSpace``.
        granularity: See ``RankSpace``.
        steps: Training steps of one recovery.
        storage: Optuna storage URL. Default: SQLite in ``out``.
        study_name: Name of the study.

    Raises:
        ValueError: A setting is out of range; nothing has been written then.
    """

    out: Path
    trials: int = 10
    seed: int = 0
    model: str | None = None
    ratio: float = 0.25
    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str = "uniform:8"
    granularity: Granularity = "layer"
    steps: int = 8
    storage: str | None = None
    study_name: str = "quickstart"

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}.")
        checked_candidates(self.candidates)
        # raises on a budget that no layer can meet
        RankSpace(1, self.candidates, self.budget, granularity=self.granularity)

    def recipe(self) -> dict[str, Any]:
        """What makes two trials comparable; stored with the study and in ``out``."""
        recipe = {
            "model": self.model or "embedded: SmolLM2-135M-Instruct",
            "dtype": str(search_dtype()).removeprefix("torch."),
            "pruning": {"method": "llm-pruner", "ratio": self.ratio},
            "candidates": list(self.candidates),
            "budget": self.budget,
            # what is off is not said, as it is not in earlier runs' recipes
            "training": {k: v for k, v in asdict(self.training()).items() if v is not None and v is not False},
            "data": {
                "text": "Python language reference",
                "block": _BLOCK,
                "validation_blocks": _VALIDATION_BLOCKS,
            },
            "seed": self.seed,
        }
        # said only where it is not the default, as it is in no earlier run's recipe
        return recipe if self.granularity == "layer" else {**recipe, "granularity": self.granularity}

    def training(self) -> TrainingConfig:
        """Settings of one recovery."""
        return TrainingConfig(steps=self.steps)


def storage_url(config: Quickstart) -> str:
    """Where the study lives."""
    return config.storage or f"sqlite:///{(config.out / 'study.db').as_posix()}"


@dataclass
class Outcome:
    """What a quickstart found.

    Attributes:
        study: The study.
        recommendation: The recommended configuration.
        space: The rank space.
        dense: Loss and accuracy of the dense model.
        pruned: The same of the pruned one.
        uniform: Of the uniform recovery: ``losses`` by fresh seed, ``accuracy`` on the first of them.
        recommended: The same of the recommended one.
        seconds: Wall time of this run.
        recipe: The settings.
    """

    study: Study
    recommendation: Recommendation
    space: RankSpace
    dense: dict[str, Any]
    pruned: dict[str, Any]
    uniform: dict[str, Any]
    recommended: dict[str, Any]
    seconds: float
    recipe: dict[str, Any]


def run(config: Quickstart, say: Callable[[str], None] = print) -> Outcome:
    """Runs the quickstart, or goes on where an earlier run with the same settings stopped.

    Args:
        config: Settings.
        say: Receives one line for each step.

    Raises:
        ValueError: The settings do not fit the model, or ``out`` or the study belongs to other settings.
    """
    start = time.perf_counter()
    _quiet()
    recipe = config.recipe()
    check_output_folder(config.out, recipe)
    shared = open_shared(config.storage, config.study_name, recipe)
    texts = load_texts()

    say("[1/6] Model: load, prune, measure")
    results, job, meter = _prepare(config, recipe, texts)
    space = job.space
    dense, pruned = results.values["dense"], results.values["pruned"]
    say(f"      held-out loss: dense {dense['loss']:.3f}, pruned {pruned['loss']:.3f} nats/token; {space!r}")

    url = storage_url(config)
    say(f"[2/6] Study {config.study_name!r} in {masked(url)}")
    study = create_study(
        storage=shared or url,
        study_name=config.study_name,
        sampler=RankAdaptorSampler(space, seed=config.seed),
        direction="minimize",
        recipe=recipe,
    )
    study.set_metric_names(["loss (nats/token)"])
    say(f"[3/6] Search: {config.trials} recoveries of {config.steps} steps, uniform first, all within the budget")
    run_trials(study, job, config.trials, shared=config.storage is not None)
    recommendation = recommend(study)
    say(f"[4/6] Recommend: {recommendation.evidence.statement}")

    say(f"[5/6] Confirm: uniform against recommended, {N_REPORT_SEEDS} fresh seeds, text the search has not seen")
    recommended = _confirm("recommended", recommendation.ranks, job, meter, config, results)
    uniform = _confirm("uniform", space.uniform(), job, meter, config, results)
    seconds = time.perf_counter() - start
    outcome = Outcome(study, recommendation, space, dense, pruned, uniform, recommended, seconds, recipe)
    from rankadaptor_optuna.views.report import write_report

    say(f"[6/6] Report: {config.out / 'report.md'}")
    write_report(outcome, config.out)
    return outcome


def _quiet() -> None:
    """Leaves the screen to our own progress bars."""
    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _prepare(config: Quickstart, recipe: dict[str, Any], texts: Texts) -> tuple[Results, RecoveryObjective, _Meter]:
    """The pruned model, ready for trials, and the measurements of dense and pruned."""
    folder = config.out / "pruned"
    dense = fresh = None
    if folder.exists():
        model, tokenizer = load_model(folder)
    else:
        dense, tokenizer = load_model(config.model)
        check_prunable(dense)  # before a progress bar is on the screen
        with bar("prune: importance on samples", 10) as shown:
            fresh = prune(
                dense,
                tokenizer,
                ratio=config.ratio,
                calibration=texts.train,
                n_samples=10,
                seed=config.seed,
                progress=lambda done, total: shown.update(1),
            )
        model = fresh.model.to(dense.device)
    job = RecoveryObjective(
        model,
        tokenizer,
        RankSpace.from_model(model, config.candidates, config.budget, granularity=config.granularity),
        train=texts.train,
        validation=texts.validation,
        training=config.training(),
        block_length=_BLOCK,
        validation_blocks=_VALIDATION_BLOCKS,
        seed=config.seed,
    )
    if fresh is not None:  # nothing is written before this point: every setting has proved possible
        config.out.mkdir(parents=True, exist_ok=True)
        write_text(config.out / "settings.json", json.dumps(recipe, indent=1))
        fresh.save(folder, tokenizer)
    results = Results(config.out / "results.json")
    meter = _Meter(texts, tokenizer)
    results.get("dense", lambda: meter.measure("dense", dense or load_model(config.model)[0]))
    results.get("pruned", lambda: meter.measure("pruned", model))
    return results, job, meter


class _Meter:
    """Measures models on the report's text, which neither training nor search has seen."""

    def __init__(self, texts: Texts, tokenizer: Any) -> None:  # noqa: ANN401
        self._blocks = token_blocks(tokenizer, texts.report, _BLOCK, limit=_REPORT_BLOCKS)
        self._suite = TaskSuite(tokenizer, [continuation_task(continuation_items(texts.report, _ITEMS))])

    def loss(self, name: str, model: Any) -> float:  # noqa: ANN401
        with bar(f"{name}: held-out loss", len(self._blocks)) as shown:
            return float(block_losses(model, self._blocks, on_batch=lambda done: shown.update(done - shown.n)).mean())

    def accuracy(self, name: str, model: Any) -> list[float]:  # noqa: ANN401
        with bar(f"{name}: lm-eval continuation", 4 * _ITEMS) as shown:
            (score,) = self._suite.evaluate(model, on_requests=lambda n: shown.update(n))
        return [score.accuracy, score.stderr]

    def measure(self, name: str, model: Any) -> dict[str, Any]:  # noqa: ANN401
        parameters = sum({id(p): p.numel() for p in model.parameters()}.values())  # tied ones once
        return {
            "loss": self.loss(name, model),
            "accuracy": self.accuracy(name, model),
            "parameters": parameters,
        }


def _confirm(
    name: str,
    ranks: dict[Any, int],
    job: RecoveryObjective,
    meter: _Meter,
    config: Quickstart,
    results: Results,
) -> dict[str, Any]:
    """Losses of a configuration on fresh seeds and unseen text; the first recommended recovery is saved."""
    key = f"ranks {','.join(str(rank) for rank in ranks.values())}"
    keys = [f"{key}, seed {1000 * (config.seed + 1) + i}" for i in range(N_REPORT_SEEDS)]
    save = name == "recommended"
    if save and results.values.get("adapter") != key:
        results.values.pop(keys[0], None)

    def recover(i: int) -> dict[str, Any]:
        with bar(f"{name}: recovery {i + 1} of {N_REPORT_SEEDS}", config.steps) as shown:
            job.on_step = lambda step, loss: shown.update(1)
            with job.recovered(ranks, seed=int(keys[i].split()[-1])) as model:
                shown.close()
                measured: dict[str, Any] = {"loss": meter.loss(name, model)}
                if i == 0:
                    measured["accuracy"] = meter.accuracy(name, model)
                    if save:
                        _save_adapter(model, config.out)
                        results.values["adapter"] = key
            job.on_step = None
        return measured

    measured = [results.get(keys[i], partial(recover, i)) for i in range(N_REPORT_SEEDS)]
    return {
        "losses": [m["loss"] for m in measured],
        "accuracy": measured[0]["accuracy"],
        "parameters": int(job.space.cost(ranks)),
    }


def _save_adapter(model: Any, out: Path) -> None:  # noqa: ANN401
    folder, scratch = out / "adapter", out / "adapter.part"
    model.peft_config["default"].base_model_name_or_path = str(out / "pruned")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
