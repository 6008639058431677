"""RecoveryObjective: one trial = ranks in, score out."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from optuna.exceptions import TrialPruned
from optuna.trial import Trial

from rankadaptor_optuna.attributes import ITEMS_ATTR, SENSITIVITY_ATTR
from rankadaptor_optuna.ranks import ALPHA_RATIO, TARGETS, LoraSettings, Ranks
from rankadaptor_optuna.recovery.data import Examples, instruction_examples, token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.processes import broadcast, fail_together, process_index
from rankadaptor_optuna.recovery.sensitivity import sensitivities
from rankadaptor_optuna.recovery.tasks import Metric, TaskSuite
from rankadaptor_optuna.recovery.train import TrainingConfig, TrainingResult, train
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.space import RankSpace

if TYPE_CHECKING:
    import torch

# of a trial, not of the program; out of memory is torch's RuntimeError, and so is a killed data loader
_FAILURES = (RuntimeError, FloatingPointError, MemoryError, OSError)
_ITEMS_AT_ONCE = 4  # a forward pass of block_losses


class RecoveryObjective:
    """Recovers a pruned model with the trial's ranks and scores it, by its loss on held-out text or by lm-eval tasks.

    The model is loaded once and reused: each trial attaches an adapter, trains it and takes it off again. Every trial
    sees the same data in the same order and the same (nested) initialisation, so that scores differ by the ranks
    alone. Create the study with ``direction=objective.direction``: a lower loss is better, a higher margin or accuracy.

    A trial that fails (loss not finite, out of memory, data that cannot be read) becomes a FAIL trial with its reason
    in the user attribute ``fail_reason``; what it held is freed, and the study goes on.

    A trial of uniform ranks also measures how sensitive the loss is to each layer's adapter, once a study, by a forward
    and a backward pass over the held-out data: the performance model expects rank to be worth most where that is high.

    With ``report_every`` a trial reports its loss on the first held-out blocks along the way (negative where higher is
    better), and stops where the study's pruner says so. With ``report_items`` it reports, once trained, the loss of
    each held-out block, the block's index as step, in an order of its own: ``WilcoxonPruner`` may end the evaluation
    after any batch. A trial that was stopped is PRUNED: the performance model learns what its reports predict, never a
    mean over some of the items. Trials that verify a recommendation do not report. A finished trial has the user
    attributes ``trainable_parameters``, ``seconds``, ``tokens_per_second`` (of training), on a GPU ``peak_gpu_mib``,
    elsewhere ``peak_rss_mib`` (the process's largest resident set so far, earlier trials included; none on Windows),
    and with tasks ``loss``, ``accuracy``, ``margin`` (weighted means) and ``TASK:accuracy``, ``TASK:margin`` of each.

    Args:
        model: The pruned model, or anything with such a ``.model``. Its weights are not changed.
        tokenizer: Its tokenizer.
        space: The rank space.
        train: Texts to train on, packed into blocks; or records with ``instruction``, ``output`` and perhaps ``input``,
            an example each, of whose tokens the response's count (``instruction_examples``).
        validation: Texts or records to score on.
        training: Settings of the training loop.
        block_length: Tokens per block; of a record at most.
        validation_blocks: Blocks or records to score on, at most.
        mask_prompt: Whether of records the response alone counts.
        targets: Names of the adapted modules.
        alpha_ratio: LoRA's alpha as a multiple of the rank.
        alpha: LoRA's alpha in all layers, whatever their ranks. Default: by ``alpha_ratio``.
        dropout: LoRA's dropout.
        tasks: lm-eval tasks to evaluate each trial on. Default: none.
        metric: What the score is: ``"loss"``, nats per token; ``"margin"`` or ``"accuracy"``, the mean over the tasks
            by their weights. The margin is the smoother one: an accuracy on few items is too coarse to search on.
        report_every: Steps between reports to Optuna's pruner. Default: none.
        report_blocks: Held-out blocks or records that a report is made on, the first ones.
        report_items: Whether to report the final evaluation block by block (or record) instead, with metric ``"loss"``:
            lm-eval runs the items of all its tasks in one go.
        seed: Seed of data order and initialisation, common to all trials but those that verify, which bring their own.
        on_step: Called with (step, loss) during training.

    Raises:
        ValueError: A text is too short for one block, a record lacks a field, a setting is not positive, reports are of
            both kinds or items not of the metric, or there is no task that the metric can be measured on.

    Attributes:
        direction: ``"minimize"`` or ``"maximize"``: for ``create_study``.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        space: RankSpace,
        *,
        train: Sequence[str] | Sequence[Mapping[str, Any]],
        validation: Sequence[str] | Sequence[Mapping[str, Any]],
        training: TrainingConfig | None = None,
        block_length: int = 256,
        validation_blocks: int = 12,
        mask_prompt: bool = True,
        targets: Sequence[str] = TARGETS,
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
        self.seed = seed
        self.on_step = on_step
        self.lora = LoraSettings(tuple(targets), alpha_ratio, alpha, dropout)
        self._report_every, self._report_items = report_every, report_items
        read = partial(examples_of, tokenizer, length=block_length, mask_prompt=mask_prompt)
        self.train = read(train)
        self.training = (training or TrainingConfig()).for_examples(len(self.train))
        self.held_out = read(validation, limit=validation_blocks)
        self._report = self.held_out.first(report_blocks)

    @contextmanager
    def recovered(
        self,
        ranks: Mapping[Any, int],
        *,
        seed: int | None = None,
        on_step: Callable[[Any, int], None] | None = None,
        on_trained: Callable[[TrainingResult], None] | None = None,
    ) -> Iterator[Any]:
        """The model recovered with ``ranks`` (of the searched layers), as a context: the adapter is gone after it.

        Args:
            ranks: As the space's ``suggest`` returns them.
            seed: Another seed of data order and initialisation than the study's.
            on_step: Called with the model and the number of steps done after each.
            on_trained: Called with what the training did.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank.
            FloatingPointError: The loss is not finite.
        """
        seed = self.seed if seed is None else seed
        adapted = self.space.with_fixed(ranks)
        if not any(adapted.values()):  # nothing to train: the pruned model as it is
            yield self.model
            return
        device = next(self.model.parameters()).device
        if process_index() == 0:
            broadcast([1, seed, *(int(ranks[module]) for module in self.space.modules)], device)
        config = lora_config(adapted, self.lora)
        with ExitStack() as stack:
            with fail_together(device):
                model = stack.enter_context(attached(self.model, config, seed=seed))

            def after(step: int, loss: float) -> None:
                if self.on_step is not None:
                    self.on_step(step, loss)
                if on_step is not None:
                    on_step(model, step + 1)

            result = train(model, self.train, self.training, seed=seed, on_step=after)
            if on_trained is not None:
                on_trained(result)
            yield model

    def follow(self) -> None:
        """Takes part, as another than the main process, in its recoveries until it calls ``release``."""
        device = next(self.model.parameters()).device
        while True:
            on, seed, *ranks = broadcast([0, 0, *([0] * len(self.space.modules))], device)
            if not on:
                return
            try:
                with self.recovered(Ranks(zip(self.space.modules, ranks, strict=True)), seed=seed):
                    pass
            except _FAILURES:  # the main process says so of the trial
                _free_memory()

    def release(self) -> None:
        """Ends what other processes do in ``follow``; on the main process, once no more recoveries come."""
        broadcast([0, 0, *([0] * len(self.space.modules))], next(self.model.parameters()).device)

    def __call__(self, trial: Trial) -> float:
        """The score by the objective's metric; NaN, which Optuna records as FAIL, where the recovery failed.

        Raises:
            optuna.TrialPruned: The study's pruner stopped the trial.
        """
        ranks = self.space.suggest(trial)
        trial.set_user_attr("trainable_parameters", int(self.space.cost(ranks)))
        seed = verification_seed(trial)

        def report(model: Any, done: int) -> None:  # noqa: ANN401
            if self._report_every and done % self._report_every == 0 and done < self.training.steps:
                loss = float(block_losses(model, self._report).mean())
                trial.report(loss if self.direction == "minimize" else -loss, done)
                if trial.should_prune():
                    raise TrialPruned(f"stopped after {done} of {self.training.steps} steps")

        def note(result: TrainingResult) -> None:
            trial.set_user_attr("tokens_per_second", round(result.tokens / result.seconds, 1))

        start, failed = time.perf_counter(), None
        try:
            with (
                _peak_memory(trial, next(self.model.parameters()).device),
                self.recovered(ranks, seed=seed, on_step=report if seed is None else None, on_trained=note) as model,
            ):
                score = self._score(trial, model, by_item=self._report_items and seed is None)
                note_sensitivity(trial, self.space, model, self.held_out)
            if not math.isfinite(score):
                raise FloatingPointError(f"the {self.metric} on held-out data is {score}.")
        except _FAILURES as error:
            failed = f"{type(error).__name__}: {error}"[:500]
        if failed is not None:  # the error is gone by now, and with it what its frames held
            trial.set_user_attr("fail_reason", failed)
            _free_memory()
            return float("nan")
        trial.set_user_attr("seconds", round(time.perf_counter() - start, 2))
        return score

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
        """Reports the loss of each held-out block; the order is shuffled lest the first ones decide every trial."""
        trial.set_user_attr(ITEMS_ATTR, True)
        losses = np.zeros(len(self.held_out))
        order = np.random.default_rng([self.seed, trial.number]).permutation(len(losses)).tolist()
        for start in range(0, len(order), _ITEMS_AT_ONCE):
            if start and trial.should_prune():
                raise TrialPruned(f"evaluation stopped after {start} of {len(order)} items")
            rows = order[start : start + _ITEMS_AT_ONCE]
            losses[rows] = block_losses(model, self.held_out.of_rows(rows))
            for row in rows:
                trial.report(float(losses[row]), row)
        return losses


def note_sensitivity(
    trial: Trial,
    space: RankSpace,
    model: Any,  # noqa: ANN401
    data: torch.Tensor | Examples,
) -> None:
    """Tells the study how sensitive the loss is to each layer: where the sampler expects rank to be worth most.

    ``RecoveryObjective`` does so by itself. An objective of your own calls it at the end of each trial: it measures in
    one of uniform ranks (the first that ``RankAdaptorSampler`` proposes), once a study, and else does nothing.

    Args:
        trial: The trial, after ``space.suggest(trial)``.
        space: The rank space.
        model: The PEFT model that was trained with the trial's ranks.
        data: What the trial is scored on: blocks of token ids, (n, length), or examples. See ``sensitivities``.
    """
    study = getattr(trial, "study", None)  # which a FixedTrial has not
    uniform = space.uniform()
    is_uniform = bool(uniform.adapted) and space.to_params(uniform).items() <= trial.params.items()
    if study is None or not is_uniform or verification_seed(trial) is not None or SENSITIVITY_ATTR in study.user_attrs:
        return
    found = space.by_module(sensitivities(model, data))
    if not all(map(math.isfinite, found.values())):  # the recovery diverged; another uniform trial may tell
        return
    study.set_user_attr(SENSITIVITY_ATTR, {space.name(module): value for module, value in found.items()})


def examples_of(
    tokenizer: Any,  # noqa: ANN401
    data: Sequence[str] | Sequence[Mapping[str, Any]],
    *,
    length: int,
    mask_prompt: bool,
    limit: int | None = None,
) -> Examples:
    """Examples of texts, packed into blocks, or of instruction records.

    Args:
        tokenizer: A Hugging Face tokenizer.
        data: Texts or records.
        length: Tokens of a block; of a record at most.
        mask_prompt: Whether of records the response alone counts.
        limit: At most so many blocks or records. Default: all.

    Raises:
        ValueError: There is too little text, a record lacks a field, or there are some of each.
    """
    records = [item for item in data if isinstance(item, Mapping)]
    if not records:
        texts = [item for item in data if isinstance(item, str)]
        return Examples.of_blocks(token_blocks(tokenizer, texts, length, limit))
    if len(records) < len(data):
        raise ValueError("data must be texts or records, not some of each.")
    return instruction_examples(tokenizer, records, length, mask_prompt=mask_prompt, limit=limit)


def _free_memory() -> None:
    """Gives back what a failed recovery left: graphs refer to themselves, and torch keeps its blocks for itself."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _peak_memory(trial: Trial, device: Any) -> Iterator[None]:  # noqa: ANN401
    """Notes the most memory in MiB: on a GPU what was allocated meanwhile, else what the process has held so far."""
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        if on_gpu:
            trial.set_user_attr("peak_gpu_mib", round(torch.cuda.max_memory_allocated(device) / 2**20))
        elif (peak := _peak_rss()) is not None:
            trial.set_user_attr("peak_rss_mib", round(peak / 2**20))


def _peak_rss() -> int | None:
    """Bytes of the process's largest resident set; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_reports(report_every: int | None, report_items: bool, metric: Metric) -> None:
    """Whether a trial can report so; see ``RecoveryObjective``.

    Raises:
        ValueError: It cannot; the message names the setting.
    """
    if report_every is not None and report_every < 1:
        raise ValueError(f"report_every must be at least 1, got {report_every}.")
    if report_items and report_every is not None:
        raise ValueError("report_items: a pruner compares steps or items; give report_every or report_items, not both.")
    if report_items and metric != "loss":
        raise ValueError(f"report_items: items are of metric 'loss' alone, not {metric!r}; use report_every.")
