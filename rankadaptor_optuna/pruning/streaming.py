"""Runs a model block by block over calibration samples, so that the device holds the work of one block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankadaptor_optuna.pruning.calibration import check_vocabulary
from rankadaptor_optuna.pruning.structure import transformer_layers


class BlockStream:
    """The transformer blocks of a LLaMA-like model, called one at a time.

    Hidden states are kept on the CPU, one tensor of shape (1, tokens, hidden) per sample, and are on a block's device
    only while this block runs. Device memory beside the model therefore grows with one block, not with the depth.

    Args:
        model: A causal language model in evaluation mode.
        samples: Token ids, (samples, tokens). All have one length, so all share the arguments of the blocks.

    Attributes:
        samples: As given.
        layers: The blocks, first to last.

    Raises:
        ValueError: A token id is outside the model's vocabulary, or the model is not LLaMA-like.
    """

    def __init__(self, model: nn.Module, samples: torch.Tensor) -> None:
        self.layers = transformer_layers(model)
        self.samples = samples
        self._model = model
        vocabulary = model.get_parameter("model.embed_tokens.weight").shape[0]
        check_vocabulary(samples, vocabulary)
        self._arguments = self._record_arguments()

    @torch.no_grad()
    def _record_arguments(self) -> list[dict[str, Any]]:
        """Records the keyword arguments of each block (mask, positions, ...), equal for all samples of one length."""
        recorded: list[dict[str, Any]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.append(kwargs)

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            self._model.model(input_ids=self._ids(0), use_cache=False)  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
        return recorded

    def _ids(self, sample: int) -> torch.Tensor:
        return self.samples[sample].unsqueeze(0).to(self._model.get_parameter("model.embed_tokens.weight").device)

    def embed(self) -> list[torch.Tensor]:
        """Returns the inputs of the first block by sample, with gradients if these are enabled."""
        embedding = self._model.get_submodule("model.embed_tokens")
        return [embedding(self._ids(i)).cpu() for i in range(len(self.samples))]

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Runs a block on one sample's hidden states; the result stays on the block's device."""
        device = next(self.layers[index].parameters()).device
        return self.layers[index](hidden.to(device), **self._arguments[index])

    @torch.no_grad()
    def advance(self, index: int, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs a block on all samples and returns the inputs of the next block, on the CPU."""
        return [self.run(index, h).cpu() for h in hidden]

    def loss(self, sample: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the mean next-token loss of a sample, given the output of the last block."""
        norm, head = self._model.get_submodule("model.norm"), self._model.get_submodule("lm_head")
        hidden = norm(hidden.to(next(norm.parameters()).device))
        logits = head(hidden.to(next(head.parameters()).device))[0, :-1].float()
        return nn.functional.cross_entropy(logits, self.samples[sample, 1:].to(logits.device))
