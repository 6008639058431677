"""Texts and instruction records -> token sequences to train and score on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that is no target, as transformers has it
_PREAMBLE = (
    "Below is an instruction that describes a task{input}. "
    "Write a response that appropriately completes the request.\n\n"
)
_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Examples:
    """Token sequences, each with the labels that count in its loss.

    Attributes:
        ids: Token ids by example, (length,) each.
        labels: The same, with ``IGNORED`` where a token is no target; at least one token after the first is.
    """

    ids: Sequence[torch.Tensor]
    labels: Sequence[torch.Tensor]

    @classmethod
    def of_blocks(cls, blocks: torch.Tensor) -> Examples:
        """Blocks of one length, (n, length), every token a target."""
        return cls(list(blocks), list(blocks))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ids)

    def first(self, n: int) -> Examples:
        """The first ``n`` examples."""
        return self.of_rows(range(min(n, len(self))))

    def of_rows(self, rows: Iterable[int]) -> Examples:
        """Some of the examples, in that order."""
        chosen = list(rows)
        return Examples([self.ids[row] for row in chosen], [self.labels[row] for row in chosen])

    def n_targets(self, rows: Iterable[int]) -> int:
        """Targets of some examples: labels after the first token, which nothing predicts."""
        return sum(int((self.labels[row][1:] != IGNORED).sum()) for row in rows)

    def by_length(self, rows: Iterable[int], size: int) -> list[list[int]]:
        """Cuts rows into groups of at most ``size`` whose lengths are alike, so that little is padded."""
        ordered = sorted(rows, key=lambda row: -len(self.ids[row]))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Model inputs of some examples, padded on the right; no mask where nothing is padded."""
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


def alpaca_prompt(record: Mapping[str, Any]) -> str:
    """The prompt of Stanford Alpaca for a record's ``instruction`` and, where there is one, ``input``."""
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
    """Instruction records as examples, in Alpaca's format, each ended by the end-of-sequence token.

    Args:
        tokenizer: A Hugging Face tokenizer; its begin-of-sequence token comes first where it has one.
        records: With ``instruction``, ``output`` and perhaps ``input``.
        cutoff: Tokens after which an example is cut off; one that has no target left is dropped.
        mask_prompt: Whether the response alone counts in the loss, as in LLM-Pruner's recovery.
        limit: At most so many examples. Default: all.

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
