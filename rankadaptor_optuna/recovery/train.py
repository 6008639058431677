"""The training loop of a recovery: every rank configuration sees the same data in the same order."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_optuna.checks.numbers import check_numbers
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.processes import (
    fail_together,
    n_processes,
    process_index,
    shared_gradients,
    sum_over_processes,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a recovery. The defaults are set by hand for the embedded model on a CPU.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: Examples per step.
        learning_rate: Peak of AdamW's learning rate; linear warm-up, then cosine decay to 0.
        warmup: Share of the steps that warm up; from 1 on, their number.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Largest norm of the gradient, which is clipped to it.
        micro_batch_size: Examples per forward pass; gradients are accumulated over the batch. Default: the whole batch.
        gradient_checkpointing: Whether to recompute activations in the backward pass: less memory, more time.
        epochs: Number of passes over the data, instead of ``steps``. Default: ``steps`` counts.
        linear_decay: Whether the learning rate decays linearly, the default of Hugging Face's Trainer.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = 8
    batch_size: int = 2
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    epochs: float | None = None
    linear_decay: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("steps", "batch_size", "learning_rate", "max_grad_norm", "micro_batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
            if value == math.inf and name != "max_grad_norm":
                raise ValueError(f"{name} must be finite, got {value}.")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} must be finite, got inf.")

    def for_examples(self, n: int) -> TrainingConfig:
        """Converts ``epochs`` to ``steps`` for ``n`` examples; the next pass fills up an incomplete last batch."""
        if self.epochs is None:
            return self
        return replace(self, steps=math.ceil(self.epochs * n / self.batch_size), epochs=None)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a recovery.

    Attributes:
        loss: Mean training loss of the last quarter of the steps, in nats per target.
        tokens: Number of tokens seen, without padding.
        seconds: Wall-clock seconds.
    """

    loss: float
    tokens: int
    seconds: float


def batches(n_blocks: int, config: TrainingConfig, seed: int) -> list[list[int]]:
    """Returns the block indices of every step: one shuffle of all blocks after the other, determined by ``seed``."""
    config = config.for_examples(n_blocks)
    needed = config.steps * config.batch_size
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(n_blocks) for _ in range(math.ceil(needed / n_blocks))])
    rows: list[list[int]] = order[:needed].reshape(config.steps, config.batch_size).tolist()
    return rows


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Returns the learning rate of a step as a share of its peak."""
    warmup = max(1, round(config.warmup if config.warmup >= 1 else config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return 1 - done if config.linear_decay else 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: Any,  # noqa: ANN401
    data: torch.Tensor | Examples,
    config: TrainingConfig,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    before_zero_grad: Callable[[int], Any] | None = None,
) -> TrainingResult:
    """Trains the parameters of ``model`` that require gradients on next-token prediction.

    Several processes (``recovery.processes``) take a share of every batch each, and sum their gradients.

    Args:
        model: A causal language model with an adapter attached.
        data: Examples, or blocks of token ids, (n, length), in which every token is a target.
        config: Settings.
        seed: Seed of the data order and of dropout.
        on_step: Called with (step, loss) after each step, steps from 0.
        before_zero_grad: Called with the step before its gradients are reset (AdaLoRA needs them).

    Raises:
        FloatingPointError: The loss is not finite; the message names the step.
        RuntimeError: Another process failed.
    """
    import torch

    examples = data if isinstance(data, Examples) else Examples.of_blocks(data)
    config = config.for_examples(len(examples))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    first = next(model.parameters())  # of the base model; the adapter is float32
    device, dtype = first.device, first.dtype
    index, n_shares = process_index(), n_processes()
    losses: list[float] = []
    tokens = 0
    start = time.perf_counter()
    was_training = model.training
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed + index)  # dropout must differ between processes
            for step, rows in enumerate(batches(len(examples), config, seed)):
                total = torch.zeros((), device=device)
                n_targets = examples.n_targets(rows)
                with fail_together(device):
                    for micro in examples.by_length(rows[index::n_shares], config.micro_batch_size or len(rows)):
                        batch = {name: tensor.to(device) for name, tensor in examples.batch(micro).items()}
                        with torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
                            loss = model(**batch, use_cache=False).loss * (examples.n_targets(micro) / n_targets)
                        total += loss.detach()
                        if not torch.isfinite(total):
                            raise FloatingPointError(
                                f"training loss is {float(total)} at step {step}; lower the learning rate."
                            )
                        loss.backward()
                if step == 0:
                    _warn_of_idle(model)
                sum_over_processes([total, *shared_gradients(parameters)])
                losses.append(float(total))
                tokens += sum(len(examples.ids[row]) for row in rows)
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                if before_zero_grad is not None:
                    before_zero_grad(step)
                optimizer.zero_grad()
                with fail_together(device):
                    if on_step is not None:
                        on_step(step, losses[-1])
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
    tail = losses[-max(1, len(losses) // 4) :]
    return TrainingResult(float(np.mean(tail)), tokens, time.perf_counter() - start)


def _warn_of_idle(model: Any) -> None:  # noqa: ANN401
    """Warns of trainable parameters that no gradient has reached: they count, and have no effect."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle and n_processes() == 1:
        shown = ", ".join(idle[:3])
        warnings.warn(f"no gradient reached {len(idle)} trainable tensors in the first step: {shown}.", stacklevel=3)


def warn_of_unreached(training: TrainingConfig, report_every: int | None) -> None:
    """Warns of a warm-up, and of a first report, that a recovery is too short for."""
    if training.warmup >= max(training.steps, 2):
        warnings.warn(
            f"the learning rate warms up in {training.warmup:g} steps, but there are {training.steps}: it never "
            "reaches its peak; lower warmup.",
            stacklevel=3,
        )
    if report_every is not None and report_every >= training.steps:
        warnings.warn(
            f"report_every={report_every} of {training.steps} steps: no trial reports, and none is stopped early.",
            stacklevel=3,
        )
