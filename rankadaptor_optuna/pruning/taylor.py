"""First-order Taylor importance of heads and channels (LLM-Pruner's `param_first`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rankadaptor_optuna.pruning.structure import (
    KINDS,
    Kind,
    layer_shape,
    transformer_layers,
    unit_sums,
    unit_tensors,
)

Progress = Callable[[int, int], None]
Importance = dict[Kind, dict[int, torch.Tensor]]


def draw_samples(
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    *,
    n_samples: int,
    sample_length: int,
    seed: int,
) -> torch.Tensor:
    """Cut calibration texts into windows and draw some at random.

    The texts are joined end to end, so that short ones count too; no special tokens are added.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts.
        n_samples: Windows to draw, without replacement.
        sample_length: Tokens per window.
        seed: Decides which windows.

    Returns:
        Token ids, shape (n_samples, sample_length).

    Raises:
        ValueError: A setting is out of range, or the texts are too short.
    """
    if n_samples < 1 or sample_length < 2:
        raise ValueError(
            f"n_samples must be at least 1 and sample_length at least 2, not {n_samples} and {sample_length}"
        )
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"calibration must be a list of texts (str), not {type(texts).__name__}")
    stream = [i for text in texts for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    windows = len(stream) // sample_length
    if windows < n_samples:
        raise ValueError(
            f"calibration holds {len(stream)} tokens, too few for {n_samples} samples of {sample_length}: "
            "pass more text, or lower n_samples or sample_length"
        )
    starts = random.Random(seed).sample(range(windows), n_samples)  # noqa: S311
    return torch.tensor([stream[s * sample_length : (s + 1) * sample_length] for s in starts])


@contextmanager
def _gradients(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Sum the gradients of some parameters in float32, leaving the model afterwards as it was before."""
    training = {module: module.training for module in model.modules()}
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in wanted]

    def collector(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def collect(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None  # freed layer by layer, while the backward pass is still under way

        return collect

    with ExitStack() as stack:
        stack.callback(_restore, training, before)
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter, total in zip(wanted, totals, strict=True):
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(collector(total))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        model.eval()
        stack.enter_context(torch.enable_grad())
        yield totals


def _restore(training: dict[nn.Module, bool], before: dict[nn.Parameter, tuple[bool, torch.Tensor | None]]) -> None:
    for module, flag in training.items():
        module.training = flag
    for parameter, (requires_grad, grad) in before.items():
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad


@torch.inference_mode(False)
def taylor_importance(
    model: nn.Module, samples: torch.Tensor, layers: Sequence[int], *, progress: Progress | None = None
) -> Importance:
    """Score every head and channel of some layers by the first-order Taylor estimate of the loss it carries.

    The importance of a parameter is |w * g|, `g` being the gradient of the mean next-token loss over the
    samples: the first-order term of equation 2 of the RankAdaptor paper, `param_first` in LLM-Pruner. The
    importance of a unit is the sum over its parameters. Samples run one by one in the model's own dtype;
    gradients add up in float32.

    Args:
        model: A LLaMA-like causal language model. Its gradients and its flags are left as they were.
        samples: Token ids, shape (samples, tokens).
        layers: Which layers to score, by index.
        progress: Called with (samples done, samples in all) after each one.

    Returns:
        For each kind of unit, by layer: a float32 tensor on the CPU of shape (units,).

    Raises:
        ValueError: The token ids do not fit the model, or the gradients are not finite.
    """
    vocabulary = model.get_parameter("model.embed_tokens.weight").shape[0]
    if int(samples.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer gave token id {int(samples.max())}, but the model knows {vocabulary} tokens: "
            "pass the model's own tokenizer"
        )
    blocks = transformer_layers(model)
    wanted = [
        (kind, layer, parameter, dim)
        for kind in KINDS
        for layer in layers
        for _, parameter, dim in unit_tensors(blocks[layer], kind)
    ]
    device = model.get_parameter("model.embed_tokens.weight").device
    with _gradients(model, [parameter for _, _, parameter, _ in wanted]) as totals:
        for done, sample in enumerate(samples, start=1):
            ids = sample.unsqueeze(0).to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if progress is not None:
                progress(done, len(samples))

    importance: Importance = {kind: {} for kind in KINDS}
    for (kind, layer, parameter, dim), total in zip(wanted, totals, strict=True):
        scores = (total / len(samples) * parameter.detach().float()).abs()
        sums = unit_sums(scores, dim, getattr(layer_shape(blocks[layer]), kind)).cpu()
        importance[kind][layer] = importance[kind].get(layer, 0) + sums
    if not all(torch.isfinite(sums).all() for by_layer in importance.values() for sums in by_layer.values()):
        raise ValueError(
            f"the calibration loss has gradients that are not finite in {wanted[0][2].dtype}: "
            "load the model with dtype=torch.bfloat16 or torch.float32"
        )
    return importance
