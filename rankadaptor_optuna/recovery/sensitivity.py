"""Sensitivities: how much each adapter contributes to a recovery, measured on one trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankadaptor_optuna.recovery.data import Examples

if TYPE_CHECKING:
    import torch

SCALE = 0.75  # share of the adapters' scale at which the slope is taken; set by hand, see `sensitivities`


def sensitivities(model: Any, data: torch.Tensor | Examples) -> dict[str, float]:  # noqa: ANN401
    """Measures how fast the loss falls as each adapter is scaled up, with all at three quarters of their scale.

    At the trained scale the slope says little, because training has made it small. A little below, it is to first
    order the rise of the loss without the adapter. Takes one forward and one backward pass over the data for any number
    of layers.

    Args:
        model: A PEFT model with LoRA adapters attached; it is not changed.
        data: Blocks of token ids, (n, length), or examples. The loss is the mean over the examples of their mean loss
            per target; examples are computed one at a time to save memory.

    Returns:
        ``{name of the adapted module: nats per unit of its scale}``; negative if the adapter harms.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    examples = data if isinstance(data, Examples) else Examples.of_blocks(data)
    adapter = model.active_adapter
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_B
    }
    weights = [module.lora_B[adapter].weight for module in layers.values()]
    device, was_training = weights[0].device, model.training
    scalings = [module.scaling[adapter] for module in layers.values()]
    found = dict.fromkeys(layers, 0.0)
    model.eval()
    try:
        for module, scaling in zip(layers.values(), scalings, strict=True):
            module.scaling[adapter] = SCALE * scaling
        for row in range(len(examples)):
            batch = {name: tensor.to(device) for name, tensor in examples.batch([row]).items()}
            with torch.enable_grad():
                loss = model(**batch, use_cache=False).loss
                gradients = torch.autograd.grad(loss, weights)
            for name, weight, gradient in zip(layers, weights, gradients, strict=True):
                # B and the scale are factors of one product: dL/dscale = <B, dL/dB> / scale
                found[name] -= float((weight.detach() * gradient).sum()) / SCALE / len(examples)
    finally:
        for module, scaling in zip(layers.values(), scalings, strict=True):
            module.scaling[adapter] = scaling
        model.train(was_training)
    return found
