"""Calibration samples: windows of tokens from texts."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import torch

_MOST_CHARACTERS = 10_000_000  # some 2 million tokens, read in seconds; set by hand


def check_vocabulary(ids: torch.Tensor, n_tokens: int) -> None:
    """Checks that a model knows the tokens.

    Raises:
        ValueError: A token id is outside its vocabulary.
    """
    if int(ids.max()) >= n_tokens:
        raise ValueError(
            f"the tokenizer gave token id {int(ids.max())}, but the model knows {n_tokens} tokens: "
            "pass the model's own tokenizer"
        )


def draw_samples(
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    *,
    n_samples: int,
    sample_length: int,
    seed: int,
) -> torch.Tensor:
    """Draws windows of tokens from texts at random.

    The texts are joined end to end, so short texts count too; no special tokens are added.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Calibration texts.
        n_samples: Number of windows, drawn without replacement.
        sample_length: Tokens per window.
        seed: Seed of the draw.

    Returns:
        Token ids, shape (n_samples, sample_length).

    Raises:
        ValueError: `texts` is not a list of texts, or too short.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"calibration must be a list of texts (str), not {type(texts).__name__}")
    read, left = [], _MOST_CHARACTERS
    for text in texts:
        read.append(text[:left])
        left -= len(read[-1])
    if left <= 0:
        warnings.warn(f"only the first {_MOST_CHARACTERS:,} characters of the calibration text are read.", stacklevel=2)
    encoded = tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"] if read else []
    stream = [token for ids in encoded for token in ids]
    windows = len(stream) // sample_length
    if windows < n_samples:
        raise ValueError(
            f"calibration holds {len(stream)} tokens, too few for {n_samples} samples of {sample_length}: "
            "pass more text, or lower n_samples or sample_length"
        )
    starts = random.Random(seed).sample(range(windows), n_samples)  # noqa: S311
    return torch.tensor([stream[s * sample_length : (s + 1) * sample_length] for s in starts])
