"""Turns texts and instruction records into token sequences for training and scoring."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a token that does not count in the loss: transformers' (and PyTorch's) ignore index
# Stanford Alpaca's prompt, which LLM-Pruner's recovery uses too (templates/alpaca.json)
_PREAMBLE = (
    "Below is an instruction that describes a task{input}. "
    "Write a response that appropriately completes the request.\n\n"
)
_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Examples:
    """Token sequences with labels.

    Attributes:
        ids: Token ids by example, (length,) each.
        labels: The token ids again, with ``IGNORED`` for tokens that are no targets. Every example has a target after
            its first token.
    """

    ids: Sequence[torch.Tensor]
    labels: Sequence[torch.Tensor]

    @classmethod
    def of_blocks(cls, blocks: torch.Tensor) -> Examples:
        """Makes examples of blocks of one length, (n, length), in which every token is a target."""
        return cls(list(blocks), list(blocks))

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.ids)

    def first(self, n: int) -> Examples:
        """Returns the first ``n`` examples."""
        return self.of_rows(range(min(n, len(self))))

    def of_rows(self, rows: Iterable[int]) -> Examples:
        """Returns some of the examples, in the order given."""
        chosen = list(rows)
        return Examples([self.ids[row] for row in chosen], [self.labels[row] for row in chosen])

    def n_targets(self, rows: Iterable[int]) -> int:
        """Returns the number of targets of some examples; the first token is never predicted, so it does not count."""
        return sum(int((self.labels[row][1:] != IGNORED).sum()) for row in rows)

    def by_length(self, rows: Iterable[int], size: int) -> list[list[int]]:
        """Groups rows of similar length, at most ``size`` in a group, so that little is padded."""
        ordered = sorted(rows, key=lambda row: -len(self.ids[row]))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns the model inputs of some examples, padded on the right; without a mask if nothing is padded."""
        import torch

        length = max(len(self.ids[row]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(self.ids[row])
            ids[i, :n], labels[i, :n], mask[i, :n] = self.ids[row], self.labels[row], 1
        inputs = {"input_ids": ids, "labels": labels}
        return inputs if mask.all() else {**inputs, "attention_mask": mask}


def token_blocks(tokenizer: Any, texts: Iterable[str], length: int, limit: int | None = None) -> torch.Tensor:  # noqa: ANN401
    """Packs texts, each ended by the end-of-sequence token, into blocks of ``length`` tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Texts to pack; the last, incomplete block is dropped.
        length: Tokens per block.
        limit: Largest number of blocks. Default: all.

    Returns:
        Token ids, (n, length), int64.

    Raises:
        ValueError: The texts are too short for one block.
    """
    import torch

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    n = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, too few for one block of {length}; give more text.")
    return torch.tensor(ids[: n * length], dtype=torch.long).view(n, length)


def alpaca_prompt(record: Mapping[str, Any]) -> str:
    """Returns Stanford Alpaca's prompt for a record's ``instruction`` and its ``input``, if any."""
    extra = str(record.get("input") or "")
    middle = f"### Input:\n{extra}\n\n" if extra else ""
    return (
        f"{_PREAMBLE.format(input=_INPUT if extra else '')}### Instruction:\n{record['instruction']}\n\n{middle}"
        "### Response:\n"
    )


def instruction_examples(
    tokenizer: Any,  # noqa: ANN401
    records: Iterable[Mapping[str, Any]],
    cutoff: int,
    *,
    mask_prompt: bool = True,
    limit: int | None = None,
) -> Examples:
    """Makes examples of instruction records in Alpaca's format, each ended by the end-of-sequence token.

    Args:
        tokenizer: A Hugging Face tokenizer; its begin-of-sequence token, if any, comes first.
        records: Records with ``instruction``, ``output`` and, optionally, ``input``.
        cutoff: Largest number of tokens of an example; an example without a target left is dropped.
        mask_prompt: Whether only the response counts in the loss, as in LLM-Pruner's recovery.
        limit: Largest number of examples. Default: all.

    Raises:
        ValueError: A record lacks a field, or no example is left.
    """
    import torch

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for record in records:
        if len(ids) == limit:
            break
        if missing := [name for name in ("instruction", "output") if name not in record]:
            raise ValueError(f"a record has no {' and no '.join(missing)}, but {', '.join(record)}.")
        prompt, response = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (alpaca_prompt(record), record["output"])
        )
        tokens = torch.tensor([*start, *prompt, *response, *end][:cutoff], dtype=torch.long)
        targets = tokens.clone()
        targets[: len(start) + len(prompt) if mask_prompt else 0] = IGNORED
        if (targets[1:] != IGNORED).any():
            ids.append(tokens)
            labels.append(targets)
    if not ids:
        raise ValueError(f"no record has a response within {cutoff} tokens; raise the cutoff, or give other records.")
    return Examples(ids, labels)


def examples_of(
    tokenizer: Any,  # noqa: ANN401
    data: Sequence[str] | Sequence[Mapping[str, Any]] | Examples,
    *,
    length: int,
    mask_prompt: bool,
    limit: int | None = None,
) -> Examples:
    """Makes examples of texts, packed into blocks, or of instruction records.

    Args:
        tokenizer: A Hugging Face tokenizer.
        data: Texts or records; examples are returned as they are.
        length: Tokens per block, or largest number of tokens of a record.
        mask_prompt: Whether only the response of a record counts in the loss.
        limit: Largest number of blocks or records. Default: all.

    Raises:
        ValueError: There is too little text, a record lacks a field, or there are texts and records.
    """
    if isinstance(data, Examples):
        return data if limit is None else data.first(limit)
    records = [item for item in data if isinstance(item, Mapping)]
    if not records:
        texts = [item for item in data if isinstance(item, str)]
        return Examples.of_blocks(token_blocks(tokenizer, texts, length, limit))
    if len(records) < len(data):
        raise ValueError("data must be texts or records, not some of each.")
    return instruction_examples(tokenizer, records, length, mask_prompt=mask_prompt, limit=limit)
