"""RecoveryObjective: recovers a pruned model with a trial's ranks and returns its score."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from optuna.exceptions import TrialPruned
from optuna.trial import Trial

from rankadaptor_optuna.checks.numbers import check_seed
from rankadaptor_optuna.database.attributes import ITEMS_ATTR, UNRECOVERED_ATTR
from rankadaptor_optuna.llm.adaptable import check_language_model, check_weights
from rankadaptor_optuna.llm.layers import ModelLayers, read_layers
from rankadaptor_optuna.ranks import ALPHA_RATIO, TARGETS, LoraSettings, Ranks
from rankadaptor_optuna.recovery.data import Examples, examples_of
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, check_attachable, check_count, lora_config, trainable_parameters
from rankadaptor_optuna.recovery.memory import free_memory, peak_memory
from rankadaptor_optuna.recovery.models import check_inputs
from rankadaptor_optuna.recovery.processes import broadcast, fail_together, process_index
from rankadaptor_optuna.recovery.tasks import Metric, TaskSuite
from rankadaptor_optuna.recovery.train import TrainingConfig, TrainingResult, train, warn_of_unreached
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.sensitivity_note import note_sensitivity

_logger = logging.getLogger(__name__)
# Failures of a trial, not of the program. Out of memory and a killed data loader are RuntimeErrors of torch.
_FAILURES = (RuntimeError, FloatingPointError, MemoryError, OSError)
_ITEMS_AT_ONCE = 4  # held-out blocks between two decisions of the pruner; one forward pass of block_losses


class RecoveryObjective:
    """Recovers a pruned model with the trial's ranks and scores it, by its loss on held-out text or by lm-eval tasks.

    The model is loaded once and reused: each trial attaches an adapter, trains it and removes it. Every trial has the
    same data in the same order and the same (nested) initialisation, so scores differ by the ranks alone. Threads
    (``n_jobs``) take turns. Create the study with ``direction=objective.direction``.

    A trial that fails (loss not finite, out of memory, unreadable data) becomes a FAIL trial with its reason in the
    user attribute ``fail_reason``; its traceback is logged, its memory is freed, and the study goes on. An error of
    ``on_step`` or of the study's pruner ends the study.

    The first trial also measures the score without recovery, which ``recommend`` compares with. The first trial of
    uniform ranks also measures how sensitive the loss is to each layer's adapter, see ``note_sensitivity``.

    With ``report_every`` a trial reports its loss on the first held-out blocks during training (negated where higher
    scores are better) and stops where the study's pruner decides so. With ``report_items`` it reports the loss of each
    held-out block after training, with the block's index as step and in an order of its own: ``WilcoxonPruner`` may end
    the evaluation after any batch. A stopped trial is PRUNED: the performance model learns the score that its reports
    predict, not a mean over some items. Verification trials do not report.

    User attributes of a finished trial: ``trainable_parameters``, ``seconds``, ``tokens_per_second`` (of training), on
    a GPU ``peak_gpu_mib``, elsewhere ``peak_rss_mib`` (largest resident set of the process so far, earlier trials
    included; not on Windows), and with tasks ``loss``, ``accuracy``, ``margin`` (weighted means) and
    ``TASK:accuracy``, ``TASK:margin`` of each task.

    Args:
        model: The pruned model, or anything with such a ``.model``. Its weights are not changed.
        tokenizer: Its tokenizer.
        space: The rank space.
        train: Training data: texts, packed into blocks; or records with ``instruction``, ``output`` and, optionally,
            ``input``, one example each, see ``instruction_examples``; or examples.
        validation: Texts, records or examples to score on.
        training: Settings of the training loop.
        block_length: Tokens per block, or largest number of tokens of a record.
        validation_blocks: Largest number of blocks or records to score on.
        mask_prompt: Whether only the response of a record counts in the loss.
        targets: Names of the adapted modules. Default: the space's; every linear module of a layer if it knows none.
        alpha_ratio: LoRA's alpha as a multiple of the rank.
        alpha: One LoRA alpha for all layers, whatever their ranks. Default: by ``alpha_ratio``.
        dropout: LoRA's dropout.
        tasks: lm-eval tasks to evaluate each trial on. Default: none.
        metric: The score: ``"loss"``, nats per token; ``"margin"`` or ``"accuracy"``, weighted mean over the tasks.
            The margin is smoother: an accuracy on few items is too coarse to search on.
        report_every: Steps between reports to Optuna's pruner. Default: none.
        report_blocks: Number of held-out blocks or records, the first ones, in such a report.
        report_items: Whether to report the final evaluation block by block (or record) instead; with metric ``"loss"``
            only, as lm-eval runs the items of all its tasks in one go.
        seed: Seed of data order and initialisation of all trials but verification trials, which have their own.
        on_step: Called with (step, loss) during training.

    Attributes:
        direction: Direction for ``create_study``: ``"minimize"`` for the loss, else ``"maximize"``.

    Raises:
        ValueError: The model cannot be adapted, the space counts other parameters than its adapters have, a text is too
            short for one block, a record lacks a field, a setting is out of range, reports are of both kinds or do not
            fit the metric, or no task has the metric.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        space: RankSpace,
        *,
        train: Sequence[str] | Sequence[Mapping[str, Any]] | Examples,
        validation: Sequence[str] | Sequence[Mapping[str, Any]] | Examples,
        training: TrainingConfig | None = None,
        block_length: int = 256,
        validation_blocks: int = 12,
        mask_prompt: bool = True,
        targets: Sequence[str] | None = None,
        alpha_ratio: float = ALPHA_RATIO,
        alpha: float | None = None,
        dropout: float = 0.0,
        tasks: TaskSuite | None = None,
        metric: Metric = "loss",
        report_every: int | None = None,
        report_blocks: int = 4,
        report_items: bool = False,
        seed: int = 0,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        check_reports(report_every, report_items, metric)
        if report_blocks < 1:
            raise ValueError(f"report_blocks must be at least 1, got {report_blocks}.")
        if metric != "loss" and tasks is None:
            raise ValueError(f"metric {metric!r} needs tasks to measure it on.")
        if metric == "margin" and tasks is not None and tasks.generating:
            names = ", ".join(tasks.generating)
            raise ValueError(f"{names}: no choices, so no margin; leave it out, or use metric 'accuracy'.")
        self.tasks, self.metric = tasks, metric
        self.direction: Literal["minimize", "maximize"] = "minimize" if metric == "loss" else "maximize"
        self.model = model if hasattr(model, "named_modules") else model.model
        self.tokenizer = tokenizer
        self.space = space
        check_seed(seed)
        self.seed = seed
        self.on_step = on_step
        check_language_model(self.model)
        check_weights(self.model)
        chosen = space.targets or TARGETS if targets is None else targets
        layers = read_layers(self.model, chosen, space.granularity)
        self.lora = LoraSettings(layers.targets, alpha_ratio, alpha, dropout)
        check_counts(space, layers)
        check_attachable(self.model, self.lora, layers)
        self._report_every, self._report_items = report_every, report_items
        self._propagated: Exception | None = None
        read = partial(examples_of, tokenizer, length=block_length, mask_prompt=mask_prompt)
        self.train = read(train)
        self.training = (training or TrainingConfig()).for_examples(len(self.train))
        warn_of_unreached(self.training, report_every)
        self.held_out = read(validation, limit=validation_blocks)
        for examples in (self.train, self.held_out):
            check_inputs(self.model, examples)
        self._report = self.held_out.first(report_blocks)
        self._one_at_a_time = threading.Lock()  # trials share the model

    @contextmanager
    def recovered(
        self,
        ranks: Mapping[Any, int],
        *,
        seed: int | None = None,
        on_step: Callable[[Any, int], None] | None = None,
        on_attached: Callable[[int], None] | None = None,
        on_trained: Callable[[TrainingResult], None] | None = None,
    ) -> Iterator[Any]:
        """Recovers the model with some ranks of the searched layers for the time of the context.

        Args:
            ranks: Rank of each searched layer or sublayer.
            seed: Seed of data order and initialisation. Default: the study's.
            on_step: Called after each step with the model and the number of steps done.
            on_attached: Called with the number of trainable parameters.
            on_trained: Called with the result of the training.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank, or the space counts other parameters than train.
            FloatingPointError: The loss is not finite.
        """
        import torch

        seed = self.seed if seed is None else seed
        adapted = self.space.with_fixed(ranks)
        if not any(adapted.values()):  # nothing to train: the pruned model as it is
            if on_attached is not None:
                on_attached(0)
            yield self.model
            return
        device = next(self.model.parameters()).device
        if process_index() == 0:
            broadcast([1, seed, *(int(ranks[module]) for module in self.space.modules)], device)
        config = lora_config(adapted, self.lora)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            with fail_together(device):
                model = stack.enter_context(attached(self.model, config, seed=seed))
                check_count(model, self.space.cost(ranks))
            if on_attached is not None:
                on_attached(trainable_parameters(model))

            def after(step: int, loss: float) -> None:
                if self.on_step is not None:
                    with self._propagating():
                        self.on_step(step, loss)
                if on_step is not None:
                    on_step(model, step + 1)

            result = train(model, self.train, self.training, seed=seed, on_step=after)
            if on_trained is not None:
                on_trained(result)
            yield model

    def follow(self) -> None:
        """Takes part in the main process's recoveries until it calls ``release``; for all other processes."""
        device = next(self.model.parameters()).device
        while True:
            on, seed, *ranks = broadcast([0, 0, *([0] * len(self.space.modules))], device)
            if not on:
                return
            try:
                with self.recovered(Ranks(zip(self.space.modules, ranks, strict=True)), seed=seed):
                    pass
            except _FAILURES:  # the main process records it
                free_memory()

    def release(self) -> None:
        """Ends ``follow`` on all other processes; for the main process, after its last recovery."""
        broadcast([0, 0, *([0] * len(self.space.modules))], next(self.model.parameters()).device)

    def __call__(self, trial: Trial) -> float:
        """Returns the score of a trial; NaN, which Optuna records as FAIL, where the recovery failed.

        Raises:
            optuna.TrialPruned: The study's pruner stopped the trial.
            ValueError: The study has another direction than the score.
        """
        with self._one_at_a_time:
            return self._run(trial)

    def _run(self, trial: Trial) -> float:
        self._check_direction(trial)
        ranks = self.space.suggest(trial)
        seed = verification_seed(trial)
        on_step = partial(self._report_step, trial) if seed is None and self._report_every else None

        def note_size(n: int) -> None:
            trial.set_user_attr("trainable_parameters", n)

        def note(result: TrainingResult) -> None:
            trial.set_user_attr("tokens_per_second", round(result.tokens / result.seconds, 1))

        start, failed = time.perf_counter(), None
        try:
            with (
                peak_memory(next(self.model.parameters()).device, trial.set_user_attr),
                self.recovered(ranks, seed=seed, on_step=on_step, on_attached=note_size, on_trained=note) as model,
            ):
                score = self._score(trial, model, by_item=self._report_items and seed is None)
                note_sensitivity(trial, self.space, model, self.held_out)
            if not math.isfinite(score):
                raise FloatingPointError(f"the {self.metric} on held-out data is {score}.")
            seconds = time.perf_counter() - start
            self._note_unrecovered(trial)
        except _FAILURES as error:
            if error is self._propagated:
                raise
            failed = f"{type(error).__name__}: {error}"[:500]
            _logger.warning("Trial %d failed.\n%s", trial.number, traceback.format_exc())
        if failed is not None:  # here the error no longer keeps its frames and their tensors alive
            trial.set_user_attr("fail_reason", failed)
            free_memory()
            return float("nan")
        trial.set_user_attr("seconds", round(seconds, 2))
        return score

    def _note_unrecovered(self, trial: Trial) -> None:
        """Stores with the study the score of the pruned model without recovery, unless it is there."""
        study = getattr(trial, "study", None)  # a FixedTrial has none
        if study is None or UNRECOVERED_ATTR in study.user_attrs or verification_seed(trial) is not None:
            return
        if self.tasks is None or self.metric == "loss":
            score = float(block_losses(self.model, self.held_out).mean())
        else:
            score = self.tasks.weighted(self.tasks.evaluate(self.model), self.metric)
        if math.isfinite(score):
            study.set_user_attr(UNRECOVERED_ATTR, score)

    def _check_direction(self, trial: Trial) -> None:
        study = getattr(trial, "study", None)  # a FixedTrial has none
        directions = [] if study is None else [direction.name.lower() for direction in study.directions]
        if directions and directions != [self.direction]:
            raise ValueError(
                f"the study is to {' and '.join(directions)}, the {self.metric} to {self.direction}: create the study "
                "with direction=objective.direction."
            )

    def _report_step(self, trial: Trial, model: Any, done: int) -> None:  # noqa: ANN401
        """Reports the loss on the first held-out blocks at every ``report_every``-th step but the last.

        Raises:
            optuna.TrialPruned: The study's pruner stopped the trial.
        """
        assert self._report_every is not None
        if done % self._report_every == 0 and done < self.training.steps:
            loss = float(block_losses(model, self._report).mean())
            trial.report(loss if self.direction == "minimize" else -loss, done)
            if self._should_prune(trial):
                raise TrialPruned(f"stopped after {done} of {self.training.steps} steps")

    @contextmanager
    def _propagating(self) -> Iterator[None]:
        """Marks an error of the user's code, which is no failure of the trial."""
        try:
            yield
        except Exception as error:
            self._propagated = error
            raise

    def _should_prune(self, trial: Trial) -> bool:
        with self._propagating():
            return trial.should_prune()

    def _score(self, trial: Trial, model: Any, *, by_item: bool) -> float:  # noqa: ANN401
        losses = self._losses_by_item(trial, model) if by_item else block_losses(model, self.held_out)
        found = {"loss": float(losses.mean())}
        if self.tasks is None:
            return found["loss"]
        scores = self.tasks.evaluate(model)
        found["accuracy"] = self.tasks.weighted(scores, "accuracy")
        if not self.tasks.generating:
            found["margin"] = self.tasks.weighted(scores, "margin")
        named = {f"{s.task}:{what}": getattr(s, what) for s in scores for what in ("accuracy", "margin")}
        for name, value in {**found, **named}.items():
            if value is not None:
                trial.set_user_attr(name, value)
        return found[self.metric]

    def _losses_by_item(self, trial: Trial, model: Any) -> NDArray[np.float64]:  # noqa: ANN401
        """Reports the loss of each held-out block, in an order of the trial's own: no block decides every trial."""
        trial.set_user_attr(ITEMS_ATTR, True)
        losses = np.zeros(len(self.held_out))
        order = np.random.default_rng([self.seed, trial.number]).permutation(len(losses)).tolist()
        for start in range(0, len(order), _ITEMS_AT_ONCE):
            if start and self._should_prune(trial):
                raise TrialPruned(f"evaluation stopped after {start} of {len(order)} items")
            rows = order[start : start + _ITEMS_AT_ONCE]
            losses[rows] = block_losses(model, self.held_out.of_rows(rows))
            for row in rows:
                trial.report(float(losses[row]), row)
        return losses


def check_counts(space: RankSpace, layers: ModelLayers) -> None:
    """Checks that a space counts the parameters of a model's adapters.

    Raises:
        ValueError: It does not; the message gives both numbers at uniform ranks.
    """
    ranks = space.uniform()
    adapted = space.with_fixed(ranks)
    unknown = [module for module in adapted if module not in layers.costs]
    if unknown:
        raise ValueError(f"the space has ranks for {unknown[:3]}, where the model has nothing to adapt.")
    has, counted = sum(rank * layers.costs[module] for module, rank in adapted.items()), space.cost(ranks)
    different = [m for m, cost in zip(space.modules, space.costs, strict=True) if cost != layers.costs[m]]
    if has != counted or different:
        raise ValueError(
            f"the space counts {counted:,.0f} trainable parameters at uniform ranks, but the adapters of "
            f"{', '.join(layers.targets[:8])} have {has:,}; make it by RankSpace.from_model with the same targets."
        )


def check_reports(report_every: int | None, report_items: bool, metric: Metric) -> None:
    """Checks the settings of a trial's reports; see ``RecoveryObjective``.

    Raises:
        ValueError: A setting is out of range, or two do not fit; the message names them.
    """
    if report_every is not None and report_every < 1:
        raise ValueError(f"report_every must be at least 1, got {report_every}.")
    if report_items and report_every is not None:
        raise ValueError("report_items: a pruner compares steps or items; give report_every or report_items, not both.")
    if report_items and metric != "loss":
        raise ValueError(f"report_items needs metric 'loss', got {metric!r}; use report_every.")
