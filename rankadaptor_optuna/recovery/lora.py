"""Ranks -> LoRA on a loaded model: PEFT's rank_pattern, nested initialisation, attach and detach."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA_RATIO = 2.0


def _key(module: int | str) -> str:
    return rf"layers\.{re.escape(str(module))}\..*"  # an open dot would let layer 1 match layers 10 and 11


def rank_pattern(ranks: Mapping[Any, int]) -> dict[str, int]:
    """PEFT's ``rank_pattern`` of ``{layer index: rank}``; layers of rank 0 are left out (see ``lora_config``).

    Here and below a part of a layer may stand for the layer: ``{"3.mlp": rank}``.
    """
    return {_key(module): int(rank) for module, rank in ranks.items() if rank > 0}


def alpha_pattern(
    ranks: Mapping[Any, int], alpha_ratio: float = ALPHA_RATIO, alpha: float | None = None
) -> dict[str, float]:
    """PEFT's ``alpha_pattern`` with alpha = ``alpha_ratio`` x rank in each layer, or ``alpha`` in all.

    LoRA scales by alpha / rank, so the former keeps the scaling the same in every layer: two configurations differ by
    their ranks and not by their effective learning rates. One alpha for all is what LLM-Pruner's recovery has.
    """
    return {_key(module): alpha or alpha_ratio * int(rank) for module, rank in ranks.items() if rank > 0}


def lora_alpha(rank: int, alpha_ratio: float = ALPHA_RATIO, alpha: float | None = None) -> int:
    """PEFT's ``lora_alpha``, which is an integer, of modules of a rank; ``alpha_pattern`` has the exact one."""
    return max(1, round(alpha or alpha_ratio * rank))


def others_pattern(modules: Iterable[int | str]) -> str:
    """For PEFT's ``exclude_modules``: all that lies in layers, but not in these (parts of) layers."""
    return rf"(.*\.)?layers\.(?!({'|'.join(re.escape(str(module)) for module in modules)})\.).*"


def lora_config(
    ranks: Mapping[Any, int],
    *,
    targets: Sequence[str] = TARGETS,
    alpha_ratio: float = ALPHA_RATIO,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> LoraConfig:
    """The ``peft.LoraConfig`` of a rank configuration ``{layer index: rank}``, or ``{"3.mlp": rank}``.

    Alpha is ``alpha_ratio`` times each layer's rank, or ``alpha`` in all of them.

    Layers (or parts of them) that are not in ``ranks`` or have rank 0 get no adapter.

    Raises:
        ValueError: No layer has a positive rank.
    """
    from peft import LoraConfig

    adapted = {module: int(rank) for module, rank in ranks.items() if rank > 0}
    if not adapted:
        raise ValueError("every layer has rank 0: there is nothing to train.")
    default = max(adapted.values())
    where: dict[str, Any] = {"layers_to_transform": sorted(adapted), "layers_pattern": "layers"}
    if any(isinstance(module, str) for module in adapted):
        where = {"exclude_modules": others_pattern(adapted)}
    return LoraConfig(
        r=default,
        lora_alpha=lora_alpha(default, alpha_ratio, alpha),
        rank_pattern=rank_pattern(adapted),
        alpha_pattern=alpha_pattern(adapted, alpha_ratio, alpha),
        target_modules=list(targets),
        **where,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def attached(model: Any, config: LoraConfig, *, seed: int) -> Iterator[PeftModel]:  # noqa: ANN401
    """Attaches an adapter to a loaded model and takes it off again, whatever happens inside.

    The initialisation is nested: A of rank r is the first r rows of one fixed matrix per module and seed, uniform in
    +-1/sqrt(in_features) as PEFT draws it; B is zero. So two configurations differ only by their ranks.
    """
    from peft import get_peft_model

    with detached(model):
        with fixed_rng(seed):
            adapted = get_peft_model(model, config)
        _initialise(adapted, seed)
        yield adapted


@contextmanager
def detached(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Takes off, at its end, any PEFT adapter that was attached to a model within, whatever happened."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    was_training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                model.set_submodule(name, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def fixed_rng(seed: int) -> Iterator[None]:
    """Torch's random state set to a seed within, and afterwards as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _initialise(adapted: PeftModel, seed: int) -> None:
    import torch

    with torch.no_grad():
        for name, module in adapted.named_modules():
            for weights in getattr(module, "lora_A", {}).values():
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                bound = weights.in_features**-0.5
                rows = rng.uniform(-bound, bound, size=tuple(weights.weight.shape))  # row by row: nested by rank
                weights.weight.copy_(torch.from_numpy(rows))
