"""Scores a recovered model by its held-out loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.recovery.data import IGNORED, Examples

if TYPE_CHECKING:
    import torch


def block_losses(
    model: Any,  # noqa: ANN401
    data: torch.Tensor | Examples,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Returns the mean next-token loss of each block or example, in nats per target.

    Perplexity is the exponential of the mean of the losses.

    Args:
        model: A causal language model.
        data: Blocks of token ids, (n, length), or examples, whose prompts may be masked.
        batch_size: Blocks or examples per forward pass.
        on_batch: Called with the number of blocks or examples done, after each pass.

    Returns:
        Losses, (n,), computed in float32 for any dtype of the model.
    """
    import torch

    examples = data if isinstance(data, Examples) else Examples.of_blocks(data)
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        with torch.inference_mode():
            for start in range(0, len(examples), batch_size):
                batch = examples.batch(range(start, min(start + batch_size, len(examples))))
                inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
                targets = inputs.pop("labels")[:, 1:]
                logits = model(**inputs, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
                )
                losses += (loss.view(len(targets), -1).sum(1) / (targets != IGNORED).sum(1)).tolist()
                if on_batch is not None:
                    on_batch(len(losses))
    finally:
        model.train(was_training)
    return np.asarray(losses)
