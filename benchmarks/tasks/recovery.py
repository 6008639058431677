"""Small real recovery tasks, for races between samplers that allocate LoRA ranks to layers.

Byte-level LLaMAs of 6 to 24 layers are trained on real text, pruned, and recovered with a rank per layer. A recovery
is the package's (pruning, nested initialisation, schedule), only small; several configurations are recovered at once,
8 on a CPU thread, so that one costs under a CPU second, or 64 on a GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.tasks.models import HELD_OUT, pruned_model
from benchmarks.tasks.specs import TaskSpec
from benchmarks.tasks.texts import Parts, byte_blocks
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.pruning.structure import transformer_layers
from rankadaptor_optuna.ranks import ALPHA_RATIO, TARGETS
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.sensitivity import SCALE
from rankadaptor_optuna.recovery.train import batches, learning_rate_factor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOGETHER = 8 if DEVICE == "cpu" else 64  # configurations recovered at once
_EVALUATED = 16  # blocks per forward pass of an evaluation

Asked = Sequence[tuple[Mapping[Any, int], int]]  # configurations, each with its seed


class _Stacked(nn.Module):
    """A frozen linear below K adapters: the K equal parts of a batch belong to K configurations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if getattr(linear, "bias", None) is not None:
            raise ValueError("recovery tasks do not implement linear layers with a bias; use a model without.")
        self.weight = linear.weight
        self.factors: tuple[torch.Tensor, torch.Tensor] | None = None  # A (K, rank, in), B (K, out, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factors is None:
            return nn.functional.linear(x, self.weight)
        a, b = self.factors
        merged = torch.baddbmm(self.weight, b, a, alpha=ALPHA_RATIO)  # one product for base and adapter together
        return torch.bmm(x.reshape(len(a), -1, x.shape[-1]), merged.mT).view(*x.shape[:-1], -1)


class RecoveryTask:
    """A pruned model, its rank space, and the loss after recovery.

    Args:
        spec: The settings of the task.
        pruned: The pruned model; the task takes it over.
        dense_loss: Loss of the model before pruning.
        parts: The texts.
    """

    def __init__(self, spec: TaskSpec, pruned: Any, dense_loss: float, parts: Parts) -> None:  # noqa: ANN401
        self.spec = spec
        self.space = RankSpace.from_model(pruned, spec.candidates, spec.budget, unpruned_rank=spec.unpruned_rank)
        pruned.to(DEVICE)
        self._train = byte_blocks(parts.recovery).to(DEVICE)
        self._held_out = {
            False: byte_blocks(parts.validation, HELD_OUT).to(DEVICE),
            True: byte_blocks(parts.report, HELD_OUT).to(DEVICE),
        }
        self.dense_loss = dense_loss
        self.pruned_loss = float(block_losses(pruned, self._held_out[False], HELD_OUT).mean())
        self._model = pruned.requires_grad_(False)
        self._modules: dict[tuple[int, str], _Stacked] = {}
        for index, layer in enumerate(transformer_layers(pruned)):
            for name, module in list(layer.named_modules()):
                if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear):
                    stacked = _Stacked(module)
                    layer.set_submodule(name, stacked)
                    self._modules[index, name] = stacked

    def losses(
        self, configurations: Sequence[Mapping[Any, int]], seed: int | Sequence[int], *, report: bool = False
    ) -> list[float]:
        """Recovers with each configuration and measures the held-out loss.

        Args:
            configurations: ``{layer: rank}`` of the searched layers; 0 means no adapter.
            seed: Seed of initialisation and data order, as the package uses it; one for all or one for each.
            report: Evaluate on the part that no search may see.

        Returns:
            Nats per byte; each is that of the configuration recovered alone, up to rounding.
        """
        each = [seed] * len(configurations) if isinstance(seed, int) else seed
        asked = list(zip(map(self.space.with_fixed, configurations), each, strict=True))
        found: list[float] = []
        for start in range(0, len(asked), TOGETHER):
            found += self._recover(asked[start : start + TOGETHER], self._held_out[report])
        return found

    def sensitivity(self, seed: int) -> dict[Any, float]:
        """Returns the sensitivity of the held-out loss to each searched layer at uniform ranks.

        See ``rankadaptor_optuna.recovery.sensitivity``.
        """
        uniform = self.space.with_fixed(self.space.uniform())
        flat, shapes = self._trained([(uniform, seed)])
        factors, held_out = self._cut(flat.detach(), shapes), self._held_out[False]
        weights = [(SCALE * b).requires_grad_() for b in factors[1::2]]
        found: dict[Any, float] = dict.fromkeys(self.space.layers, 0.0)
        try:
            for module, a, b in zip(self._modules.values(), factors[::2], weights, strict=True):
                module.factors = (a, b)
            for blocks in torch.split(held_out, _EVALUATED):
                loss = self._block_losses(blocks, 1).sum() / len(held_out)
                gradients = torch.autograd.grad(loss, weights)
                for (layer, _), weight, gradient in zip(self._modules, weights, gradients, strict=True):
                    if layer in found:
                        found[layer] -= float((weight.detach() * gradient).sum()) / SCALE
        finally:
            self._detach()
        return found

    def _recover(self, chunk: Asked, held_out: torch.Tensor) -> list[float]:
        flat, shapes = self._trained(chunk)
        n = len(chunk)
        try:
            with torch.inference_mode():
                self._attach(flat.detach(), shapes)
                found = [self._block_losses(blocks.repeat(n, 1), n) for blocks in torch.split(held_out, _EVALUATED)]
                return torch.cat(found, 1).mean(1).tolist()
        finally:
            self._detach()

    def _trained(self, chunk: Asked) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        """Returns all factors of all configurations after the recovery, as ``_initial`` does."""
        config = self.spec.recovery
        flat, shapes = self._initial(chunk)
        optimizer = torch.optim.AdamW([flat], config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
        try:
            for rows in zip(*(batches(len(self._train), config, seed) for _, seed in chunk), strict=True):
                self._attach(flat, shapes)
                chosen = torch.from_numpy(np.concatenate(rows)).to(DEVICE)
                loss: Any = self._block_losses(self._train[chosen], len(chunk)).mean(1).sum()
                loss.backward()
                assert flat.grad is not None
                norm = flat.grad.norm(dim=1, keepdim=True)  # of each configuration's own gradient
                flat.grad.mul_((config.max_grad_norm / (norm + 1e-6)).clamp(max=1))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        finally:
            self._detach()
        return flat, shapes

    def _initial(self, chunk: Asked) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        """Returns all factors of all configurations, (K, parameters), and the shapes that they are cut into.

        Rows of A beyond a configuration's rank are zero, and so are columns of B: each is a factor of the other's
        gradient, so they stay zero.
        """
        rank = max(1, *(r for ranks, _ in chunk for r in ranks.values()))
        factors: list[torch.Tensor] = []
        shapes: list[tuple[int, ...]] = []
        for (layer, name), module in self._modules.items():
            n_out, n_in = module.weight.shape
            peft_name = f"base_model.model.model.layers.{layer}.{name}"
            rows = torch.empty(len(chunk), rank, n_in)
            for row, (ranks, seed) in zip(rows, chunk, strict=True):
                rng = np.random.default_rng([seed, zlib.crc32(peft_name.encode())])
                row.copy_(torch.from_numpy(rng.uniform(-(n_in**-0.5), n_in**-0.5, size=(rank, n_in))))
                row[ranks.get(layer, 0) :] = 0
            factors += [rows.flatten(1), torch.zeros(len(chunk), n_out * rank)]
            shapes += [(rank, n_in), (n_out, rank)]
        return torch.cat(factors, 1).to(DEVICE).requires_grad_(), shapes

    @staticmethod
    def _cut(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        parts = torch.split(flat, [a * b for a, b in shapes], dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _attach(self, flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> None:
        factors = self._cut(flat, shapes)
        for module, a, b in zip(self._modules.values(), factors[::2], factors[1::2], strict=True):
            module.factors = (a, b)

    def _detach(self) -> None:
        for module in self._modules.values():
            module.factors = None

    def _block_losses(self, blocks: torch.Tensor, n: int) -> torch.Tensor:
        """Returns the losses (n, blocks) of n configurations, each on its own part of the blocks."""
        logits = self._model(input_ids=blocks, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
        return losses.view(n, len(blocks) // n, -1).mean(2)


def load_task(spec: TaskSpec, cache: Path | None = None) -> RecoveryTask:
    """Opens a task; its model is trained and pruned on the first call and kept in ``cache`` (default: the user's)."""
    pruned, parts, dense_loss = pruned_model(spec, cache)
    return RecoveryTask(spec, pruned, dense_loss, parts)
