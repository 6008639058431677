"""A recovery task on SmolLM2-135M, the embedded model: a model of real size beside the small ones.

Pruned by the package (global Taylor ranking, so layers differ), recovered and scored on the embedded text. It computes
in float32: bfloat16 is faster on some CPUs, but its rounding errors are as large as the differences between rank
configurations and depend on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tasks.models import made
from benchmarks.tasks.recovery import DEVICE
from rankadaptor_optuna import RankSpace, RecoveryObjective
from rankadaptor_optuna.llm.texts import load_texts
from rankadaptor_optuna.pruning import load_pruned, prune
from rankadaptor_optuna.pruning.checkpoint import save_pruned
from rankadaptor_optuna.recovery.data import examples_of
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.models import load_model, quiet
from rankadaptor_optuna.recovery.sensitivity import sensitivities
from rankadaptor_optuna.recovery.train import TrainingConfig


@dataclass(frozen=True)
class SmolLM2Spec:
    """All settings of the task; the loss is measured on ``held_out`` blocks of ``length`` tokens."""

    name: str
    family: str
    ratio: float
    recovery: TrainingConfig
    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str = "uniform:8"
    length: int = 64
    held_out: int = 32


SMOLLM2 = SmolLM2Spec("smollm2-135m-taylor", "smollm2", 0.35, TrainingConfig(10, 4, 3e-3))
# to search on: with a wider range, allocations differ by more at the same cost
SMOLLM2_WIDE = replace(SMOLLM2, candidates=(1, 2, 4, 8, 16, 32))


class SmolLM2Task:
    """A pruned model of real size with the interface of ``RecoveryTask``, one recovery at a time.

    Args:
        spec: The settings of the task.
        pruned: The pruned model.
        tokenizer: Its tokenizer.
        dense_loss: Loss of the model before pruning.
    """

    def __init__(self, spec: SmolLM2Spec, pruned: Any, tokenizer: Any, dense_loss: float) -> None:  # noqa: ANN401
        self.spec, self.dense_loss = spec, dense_loss
        pruned.to(DEVICE)
        self.space = RankSpace.from_model(pruned, spec.candidates, spec.budget)
        texts = load_texts()
        self._objective = RecoveryObjective(
            pruned,
            tokenizer,
            self.space,
            train=texts.train,
            validation=texts.validation,
            training=spec.recovery,
            block_length=spec.length,
            validation_blocks=spec.held_out,
        )
        report = examples_of(tokenizer, texts.report, length=spec.length, mask_prompt=True, limit=spec.held_out)
        self._held_out = {False: self._objective.held_out, True: report}
        self.pruned_loss = float(block_losses(pruned, self._held_out[False]).mean())

    def losses(
        self, configurations: Sequence[Mapping[Any, int]], seed: int | Sequence[int], *, report: bool = False
    ) -> list[float]:
        """Returns losses after recovery, nats per token; see ``RecoveryTask.losses``."""
        each = [seed] * len(configurations) if isinstance(seed, int) else seed
        found = []
        for ranks, own in zip(configurations, each, strict=True):
            with self._objective.recovered(ranks, seed=own) as model:
                found.append(float(block_losses(model, self._held_out[report]).mean()))
        return found

    def sensitivity(self, seed: int) -> dict[Any, float]:
        """Returns the sensitivity of each layer; see ``RecoveryTask.sensitivity``."""
        with self._objective.recovered(self.space.uniform(), seed=seed) as model:
            return self.space.by_module(sensitivities(model, self._objective.held_out))


def load_smollm2(spec: SmolLM2Spec = SMOLLM2, cache: Path | None = None) -> SmolLM2Task:
    """Opens the task; the model is fetched and pruned on the first call and kept in ``cache`` (default: the user's)."""
    quiet()
    dense, tokenizer = load_model(dtype=torch.float32, device="cpu")
    texts = load_texts()

    def make_pruned(folder: Path) -> None:
        save_pruned(prune(dense, tokenizer, ratio=spec.ratio, calibration=texts.train).model, folder)

    pruned = made(cache, f"{spec.name}-{spec.ratio:g}", make_pruned)
    held_out = examples_of(tokenizer, texts.validation, length=spec.length, mask_prompt=True, limit=spec.held_out)
    dense_loss = float(block_losses(dense, held_out).mean())
    return SmolLM2Task(spec, load_pruned(pruned, dtype=torch.float32), tokenizer, dense_loss)
