"""Texts, byte by byte: disjoint parts to train, recover and evaluate small models on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankadaptor_optuna.llm.texts import load_texts

LENGTH = 64  # bytes per block
TEXTS = ("wikitext2", "alpaca", "docs", "questions")
_PASSAGE = 2000  # characters
_QUESTIONS = ("gsm8k", "openbookqa", "arc_easy", "arc_challenge")


@dataclass(frozen=True)
class Parts:
    """Disjoint passages of one text."""

    pretraining: list[str]
    recovery: list[str]
    validation: list[str]
    report: list[str]


class ByteTokenizer:
    """A tokenizer with one token per byte and no token at the end of a text."""

    eos_token_id = None

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:  # noqa: ANN401
        """Returns the bytes of a text, or of several, as token ids."""
        return {"input_ids": list(text.encode()) if isinstance(text, str) else [list(each.encode()) for each in text]}


def data_folder() -> Path:
    """Returns the folder of the texts and tasks: ``$RANKADAPTOR_DATA``, or ../shared/data beside the repository."""
    return Path(os.environ.get("RANKADAPTOR_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def data_file(*names: str) -> Path:
    """Returns a file of the data folder.

    Raises:
        FileNotFoundError: There is no such file.
    """
    file = data_folder().joinpath(*names)
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; set RANKADAPTOR_DATA to the folder that holds the texts.")
    return file


@contextmanager
def lm_eval_tasks() -> Iterator[str]:
    """Yields the folder of the lm-eval tasks, in the working directory that their data files are relative to.

    Replaces ``contextlib.chdir``, which Python 3.10 lacks.
    """
    folder, before = data_folder().resolve(), Path.cwd()
    os.chdir(folder.parent.parent)
    try:
        yield str(folder / "tasks")
    finally:
        os.chdir(before)


def read_parts(text: str) -> Parts:
    """Cuts a text into disjoint parts, passage by passage.

    Args:
        text: One of ``TEXTS``; all but "docs" are read from the data folder.

    Raises:
        ValueError: The text is unknown.
        FileNotFoundError: A file of the text is missing.
    """
    if text == "docs":
        docs = load_texts()
        recovery = [p for i, p in enumerate(docs.train) if i % 4 == 3]
        return Parts([p for i, p in enumerate(docs.train) if i % 4 != 3], recovery, docs.validation, docs.report)
    if text == "wikitext2":
        lines = [line for name in ("validation.txt", "test.txt") for line in _lines(text, name)]
    elif text == "alpaca":
        records = [json.loads(line) for line in _lines(text, "train.jsonl")]
        lines = [f"{r['instruction']}\n{r['input']}\n{r['output']}\n\n" for r in records]
    elif text == "questions":
        records = [json.loads(line) for name in _QUESTIONS for line in _lines("tasks", name, "train.jsonl")]
        lines = [_question(record) for record in records]
    else:
        raise ValueError(f"no text named {text!r}; there are {', '.join(TEXTS)}.")
    passages = [""]
    for line in lines:
        passages[-1] += line
        if len(passages[-1]) >= _PASSAGE:
            passages.append("")
    share = [[p for i, p in enumerate(passages) if i % 10 in tenths] for tenths in (range(6), (6, 7), (8,), (9,))]
    return Parts(*share)


def byte_blocks(passages: Sequence[str], limit: int | None = None) -> torch.Tensor:
    """Returns blocks of bytes, (n, LENGTH); with a limit, that many, spread evenly over the passages."""
    stream = np.frombuffer("".join(passages).encode(), dtype=np.uint8)
    blocks = torch.from_numpy(stream[: len(stream) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    if limit is None or len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, limit).long()]


def _question(record: Mapping[str, Any]) -> str:
    """Returns a question with its answer as text."""
    question = record.get("question") or record["question_stem"]
    answer = record.get("answer")
    if answer is None:
        choices = record["choices"]
        answer = choices["text"][choices["label"].index(record["answerKey"])]
    return f"{question}\n{answer}\n\n"


def _lines(*names: str) -> list[str]:
    return data_file(*names).read_text(encoding="utf-8").splitlines(keepends=True)
