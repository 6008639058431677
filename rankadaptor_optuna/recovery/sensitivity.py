"""How much of a recovery each layer's adapter is for: what one trial tells of where rank is worth most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankadaptor_optuna.recovery.data import Examples

if TYPE_CHECKING:
    import torch

SCALE = 0.75  # near the middle between all of an adapter and half of it, see below


def sensitivities(model: Any, data: torch.Tensor | Examples) -> dict[str, float]:  # noqa: ANN401
    """How fast the loss falls as each adapter is scaled up, all of them being at three quarters of their scale.

    The derivative at the adapter as it was trained says little, as training has made it small; a little below, it is
    what the adapter contributes, to first order what the loss would rise by without it. One forward and one backward
    pass over the data, whatever the number of layers.

    Args:
        model: A PEFT model with LoRA adapters attached, which are left as they were.
        data: Blocks of token ids, (n, length), or examples; the loss is the mean over them of their mean loss per
            target. One is computed at a time, so that it takes little memory.

    Returns:
        ``{name of the adapted module: nats per unit of its scale}``; negative where less of it would be better.
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
                # B and the scale are factors of one product, so a relative change of either is the same
                found[name] -= float((weight.detach() * gradient).sum()) / SCALE / len(examples)
    finally:
        for module, scaling in zip(layers.values(), scalings, strict=True):
            module.scaling[adapter] = scaling
        model.train(was_training)
    return found
