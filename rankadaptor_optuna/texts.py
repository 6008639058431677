"""Texts for calibration and recovery: the embedded default, a file, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

_PASSAGE = 2000  # least number of characters of a passage; set by hand


@dataclass(frozen=True)
class Texts:
    """Passages of text, split into disjoint parts.

    Attributes:
        train: Texts for recovery and for the calibration of pruning.
        validation: Texts that score a trial.
        report: Texts of the final report, which no search sees.
    """

    train: list[str]
    validation: list[str]
    report: list[str]


def load_texts() -> Texts:
    """Loads the Python language reference, split 8 : 1 : 1 by passages of about 2,000 characters.

    Topics repeat whole sections of each other; repeated paragraphs are dropped, so the parts share none. The text comes
    with the running Python: another version has another text and other losses.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    passages: list[str] = []
    for topic in sorted(topics):
        passage = ""
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            key = " ".join(paragraph.split())
            if not key or key in seen:
                continue
            seen.add(key)
            passage += paragraph.rstrip() + "\n\n"
            if len(passage) >= _PASSAGE:
                passages.append(passage)
                passage = ""
        if passage:
            passages.append(passage)
    return Texts(
        train=[p for i, p in enumerate(passages) if i % 10 not in (4, 9)],
        validation=passages[4::10],
        report=passages[9::10],
    )


def read_texts(
    source: str | PathLike[str] | Sequence[str] | None = None, *, field: str | None = None, limit: int = 4000
) -> list[str]:
    """Reads texts from a list, a file or a Hub data set.

    Args:
        source: A list of texts, returned unchanged; a ``.jsonl`` or ``.json`` file with one record per line; any other
            file, read as plain text; else the name of a Hub data set, ``NAME`` or ``NAME:CONFIG``, whose train split is
            streamed. Default: the train part of the embedded text.
        field: Name of a record's text field. Default: ``text``, or Alpaca's ``instruction``, ``input`` and ``output``
            joined by line breaks.
        limit: Largest number of records to read.

    Raises:
        ValueError: There is no such file or data set, it holds no text, or a record lacks the field.
    """
    if source is None:
        return load_texts().train
    if not isinstance(source, (str, PathLike)):
        return list(source)
    name, path = fspath(source), Path(source)
    if not path.is_file():
        texts = _record_texts(_stream(name), field, limit, name)
    elif path.suffix in (".jsonl", ".json"):
        texts = _record_texts(_lines(path), field, limit, name)
    else:
        texts = [path.read_text(encoding="utf-8")]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{name} holds no text.")
    return texts


def read_records(source: str | PathLike[str], *, limit: int = 50_000) -> list[Any]:
    """Reads texts or instruction records from a file or a Hub data set.

    Args:
        source: File or data set, as for ``read_texts``; each paragraph of a text file is a text.
        limit: Largest number of texts or records.

    Returns:
        Records that have ``instruction`` and ``output``, unchanged; the ``text`` of other records; the paragraphs of a
        text file.

    Raises:
        ValueError: There is no such file or data set, it is empty, or a record has neither instruction nor text.
    """
    name, path = fspath(source), Path(source)
    if path.is_file() and path.suffix not in (".jsonl", ".json"):
        texts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        found: list[Any] = [text for text in texts if text.strip()][:limit]
    else:
        records = _lines(path) if path.is_file() else _stream(name)
        found = [_instruction_or_text(record, name) for record in islice(records, limit)]
    if not found:
        raise ValueError(f"{name} holds no text.")
    return found


def _instruction_or_text(record: Any, name: str) -> Any:  # noqa: ANN401
    if isinstance(record, Mapping) and {"instruction", "output"} <= record.keys():
        return record
    if isinstance(record, Mapping) and "text" in record:
        return str(record["text"])
    found = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
    raise ValueError(f"{name}: a record has neither text nor instruction and output, but {found}.")


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not a JSON record ({error}).") from error


def _record_texts(records: Iterable[Any], field: str | None, limit: int, name: str) -> list[str]:
    texts = []
    for record in islice(records, limit):
        if not isinstance(record, Mapping):
            raise ValueError(f"{name}: a record is {type(record).__name__}, not an object with named fields.")
        wanted = [field or "text"] if field or "text" in record else ["instruction", "input", "output"]
        if missing := [key for key in wanted if key not in record]:
            raise ValueError(f"{name}: a record has no field {', '.join(missing)}, but {', '.join(record)}; name one.")
        texts.append("\n".join(str(record[key]) for key in wanted if record[key]))
    return texts


def _stream(name: str) -> Iterator[Any]:
    """Yields the records of a Hub data set's train split as they arrive."""
    import datasets

    path, _, config = name.partition(":")
    try:
        yield from datasets.load_dataset(path, config or None, split="train", streaming=True, trust_remote_code=False)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is neither a file nor a reachable data set on the Hub ({reason}).") from error
