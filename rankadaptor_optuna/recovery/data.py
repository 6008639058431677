"""Turns texts and instruction records into token sequences for training and scoring."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

IGNORED = -100  # label of a token that does not count in the loss: transformers' (and PyTorch's) ignore index
_BATCH = 1_000_000  # characters tokenised at once; set by hand
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

    wanted = math.inf if limit is None else limit * length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: list[NDArray[np.int32]] = []
    n_tokens = 0
    for batch in _batches(texts, len):
        encoded = tokenizer(batch, add_special_tokens=False)["input_ids"]
        found.append(np.asarray([token for ids in encoded for token in [*ids, *end]], dtype=np.int32))
        n_tokens += len(found[-1])
        if n_tokens >= wanted:
            break
    n = int(min(wanted, n_tokens)) // length
    if n == 0:
        raise ValueError(f"the text has {n_tokens} tokens, too few for one block of {length}; give more text.")
    return torch.from_numpy(np.concatenate(found)[: n * length].astype(np.int64)).view(n, length)


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yields items in lists of about a million characters, with a progress bar where this takes over 2 seconds."""
    from tqdm import tqdm

    items = items if isinstance(items, Sequence) else list(items)
    with tqdm(items, desc="      tokenize", leave=False, delay=2, dynamic_ncols=True) as shown:
        batch: list[T] = []
        n = 0
        for item in items:
            batch.append(item)
            n += size(item)
            if n >= _BATCH:
                yield batch
                shown.update(len(batch))
                batch, n = [], 0
        if batch:
            yield batch


def alpaca_prompt(record: Mapping[str, Any]) -> str:
    """Returns Stanford Alpaca's prompt for a record's ``instruction`` and its ``input``, if any."""
    extra = str(record.get("input") or "")
    middle = f"### Input:\n{extra}\n\n" if extra else ""
    return (
        f"{_PREAMBLE.format(input=_INPUT if extra else '')}### Instruction:\n{record['instruction']}\n\n{middle}"
        "### Response:\n"
    )


def prompt_and_response(tokenizer: Any, record: Mapping[str, Any]) -> tuple[str, str]:  # noqa: ANN401
    """Returns the text that a record's response follows, and the response.

    Args:
        tokenizer: A Hugging Face tokenizer; its chat template, if any, formats messages.
        record: ``prompt`` and ``completion``, which are joined as they are; ``messages``, whose last one is the
            response; or ``instruction``, ``output`` and maybe ``input`` in Alpaca's format.

    Raises:
        ValueError: A field is missing or null; the message names the record's fields.
    """
    messages = record.get("messages")
    if messages:
        if not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in messages):
            raise ValueError(f"messages must have a role and a content each, got {messages!r:.80}.")
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"a conversation must end with the assistant, got {messages[-1]['role']!r}; cut it there.")
        if tokenizer.chat_template:
            from jinja2 import TemplateError

            render = partial(tokenizer.apply_chat_template, tokenize=False)
            try:
                prompt, whole = render(messages[:-1], add_generation_prompt=True), render(messages)
            except (TemplateError, ValueError) as error:
                reason = " ".join(str(error).split())
                roles = ", ".join(message["role"] for message in messages)
                raise ValueError(f"the chat template refuses a conversation of {roles} ({reason}).") from error
            if whole.startswith(prompt):
                return prompt, whole[len(prompt) :]
            warnings.warn(
                "the chat template does not put a reply after its generation prompt; Alpaca's prompt is used instead.",
                stacklevel=2,
            )
        instruction = "\n\n".join(message["content"] for message in messages[:-1])
        record = {"instruction": instruction, "output": messages[-1]["content"]}
    names = ("prompt", "completion") if "prompt" in record else ("instruction", "output")
    if missing := [name for name in names if record.get(name) is None]:
        raise ValueError(f"a record has no {' and no '.join(missing)}, but {', '.join(record)}.")
    prompt, response = (str(record[name]) for name in names)
    return (alpaca_prompt(record) if "prompt" not in record else prompt), response


def instruction_examples(
    tokenizer: Any,  # noqa: ANN401
    records: Iterable[Mapping[str, Any]],
    cutoff: int,
    *,
    mask_prompt: bool = True,
    limit: int | None = None,
) -> Examples:
    """Makes examples of instruction records, each ended by the end-of-sequence token.

    A warning counts the records that were cut or left out.

    Args:
        tokenizer: A Hugging Face tokenizer; its begin-of-sequence token, if any, comes first.
        records: Records, see ``prompt_and_response``.
        cutoff: Largest number of tokens of an example; an example without a target left is dropped.
        mask_prompt: Whether only the response counts in the loss, as in LLM-Pruner's recovery.
        limit: Largest number of examples. Default: all.

    Raises:
        ValueError: A record lacks a field, or no example is left.
    """
    import torch

    start, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    n_cut = n_dropped = 0
    for batch in _batches(
        [prompt_and_response(tokenizer, record) for record in records], lambda pair: sum(map(len, pair))
    ):
        if len(ids) == limit:
            break
        prompts, responses = (
            tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*batch, strict=True)
        )
        for prompt, response in zip(prompts, responses, strict=True):
            if len(ids) == limit:
                break
            first = [] if prompt[:1] == start else start  # chat templates may hold both tokens
            last = [] if end and end[0] in response[-2:] else end
            tokens = torch.tensor([*first, *prompt, *response, *last], dtype=torch.long)
            targets = tokens.clone()
            targets[: len(first) + len(prompt) if mask_prompt else 0] = IGNORED
            n_cut += len(tokens) > cutoff
            if (targets[1:cutoff] != IGNORED).any():
                ids.append(tokens[:cutoff])
                labels.append(targets[:cutoff])
            else:
                n_dropped += 1
    if not ids:
        raise ValueError(f"no record has a response within {cutoff} tokens; raise the cutoff, or give other records.")
    if n_cut or n_dropped:
        warnings.warn(
            f"of {len(ids) + n_dropped:,} records, {n_dropped:,} have no response within {cutoff} tokens and are left "
            f"out, and {n_cut - n_dropped:,} are cut there; a larger block_length keeps them.",
            stacklevel=2,
        )
    return Examples(ids, labels)


def _text_of(item: Any) -> Any:  # noqa: ANN401
    """Returns the text of a record with no other field of ``prompt_and_response``; all else as it is."""
    is_text = isinstance(item, Mapping) and "text" in item and not item.keys() & {"instruction", "prompt", "messages"}
    return item["text"] if is_text else item


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
    if length < 2:
        raise ValueError(f"block_length must be at least 2, a token and the next one, got {length}.")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of blocks or records must be at least 1, got {limit}.")
    if not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"the tokenizer must be of transformers (AutoTokenizer), got {type(tokenizer).__name__}.")
    if isinstance(data, Examples):
        return data if limit is None else data.first(limit)
    if isinstance(data, (str, bytes, Mapping)):
        raise ValueError(
            f"data must be a list of texts or records, got one {type(data).__name__}; texts.read_records reads files."
        )
    items = [_text_of(item) for item in data]
    for number, item in enumerate(items, start=1):
        if not isinstance(item, (str, Mapping)):
            raise ValueError(f"item {number} of the data is a {type(item).__name__}; data must be texts or records.")
    records = [item for item in items if isinstance(item, Mapping)]
    if not records:
        if not any(text.strip() for text in items):
            raise ValueError("the data holds no text.")
        return Examples.of_blocks(token_blocks(tokenizer, items, length, limit))
    if len(records) < len(items):
        raise ValueError("data must be texts or records, not some of each.")
    return instruction_examples(tokenizer, records, length, mask_prompt=mask_prompt, limit=limit)
