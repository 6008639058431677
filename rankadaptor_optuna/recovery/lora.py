"""LoRA on a loaded model: attach and detach an adapter, with nested initialisation."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_optuna.ranks import LoraSettings, Ranks

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def lora_config(ranks: Mapping[Any, int], settings: LoraSettings | None = None) -> LoraConfig:
    """Returns the ``peft.LoraConfig`` of a rank configuration; modules without a positive rank get no adapter.

    Args:
        ranks: Rank by module (``Ranks``).
        settings: The adapters' other settings. Default: ``LoraSettings()``.

    Raises:
        ValueError: No module has a positive rank.
    """
    from peft import LoraConfig

    return LoraConfig(**Ranks(ranks).lora_arguments(settings))


@contextmanager
def attached(model: Any, config: LoraConfig, *, seed: int) -> Iterator[PeftModel]:  # noqa: ANN401
    """Attaches an adapter to a loaded model and removes it on exit, also after an error.

    The initialisation is nested: A of rank r is the first r rows of one fixed matrix per module and seed, uniform in
    +-1/sqrt(in_features) like PEFT's default; B is zero. Two configurations therefore differ by their ranks alone.

    Args:
        model: A loaded model.
        config: The adapter.
        seed: Seed of the initialisation.

    Yields:
        The model with the adapter.
    """
    from peft import get_peft_model

    with detached(model):
        with fixed_rng(seed):
            adapted = get_peft_model(model, config)
        _initialise(adapted, seed)
        yield adapted


@contextmanager
def detached(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Removes on exit every PEFT adapter that was attached to the model, also after an error."""
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
    """Seeds torch within the context and restores its random state on exit."""
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
