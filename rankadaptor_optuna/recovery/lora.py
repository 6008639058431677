"""LoRA on a loaded model: attach and detach an adapter, with nested initialisation."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_optuna.llm.layers import ModelLayers
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
    with detached(model):
        with fixed_rng(seed):
            adapted = adapted_model(model, config)
        _initialise(adapted, seed)
        yield adapted


def adapted_model(model: Any, config: Any, **options: Any) -> PeftModel:  # noqa: ANN401
    """Returns ``peft.get_peft_model``; tells PEFT where weights are transposed, as in GPT-2, or it would warn."""
    from peft import get_peft_model

    config.fan_in_fan_out = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return get_peft_model(model, config, **options)


@contextmanager
def detached(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Removes on exit every PEFT adapter that was attached to the model, also after an error."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    was_training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name in reversed(wrapped):  # inner wrappers first: PEFT wraps fused experts more than once
            base: Any = model.get_submodule(name)
            while hasattr(base, "base_layer"):
                base = base.base_layer
            model.set_submodule(name, base)
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def trainable_parameters(model: Any) -> int:  # noqa: ANN401
    """Number of parameters that require gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_count(model: Any, expected: float) -> None:  # noqa: ANN401
    """Checks the number of trainable parameters of a model with an adapter.

    Raises:
        ValueError: It is another than expected; the message gives both numbers.
    """
    if (found := trainable_parameters(model)) != expected:
        raise ValueError(
            f"the adapter has {found:,} trainable parameters, but the rank space counts {expected:,.0f}; "
            "make the space by RankSpace.from_model with the targets of the adapter."
        )


def check_attachable(model: Any, settings: LoraSettings, layers: ModelLayers) -> None:  # noqa: ANN401
    """Checks, without allocating it, that PEFT attaches an adapter to exactly the modules that were read off a model.

    Raises:
        ValueError: PEFT refuses the model, or adapts other modules.
    """
    config = lora_config(Ranks.uniform(layers.costs, 1), settings)
    with detached(model):
        try:
            adapted = adapted_model(model, config, low_cpu_mem_usage=True)
        except (ValueError, NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"PEFT cannot adapt {type(model).__name__}: {reason}") from error
        check_count(adapted, sum(layers.costs.values()))


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
