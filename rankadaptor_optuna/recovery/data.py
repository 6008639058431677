"""Texts -> blocks of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def token_blocks(tokenizer: Any, texts: Iterable[str], length: int, limit: int | None = None) -> torch.Tensor:  # noqa: ANN401
    """Packs texts, each ended by the end-of-sequence token, into blocks of ``length`` tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: What to pack; the last incomplete block is dropped.
        length: Tokens per block.
        limit: At most so many blocks. Default: all.

    Returns:
        Token ids, (n, length), int64.

    Raises:
        ValueError: There is not enough text for one block.
    """
    import torch

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    n = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, too few for one block of {length}; give more text.")
    return torch.tensor(ids[: n * length], dtype=torch.long).view(n, length)
