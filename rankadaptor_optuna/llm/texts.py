"""Texts for calibration and recovery: the embedded default, a file, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

_PASSAGE = 2000  # least number of characters of a passage; set by hand
_FIELDS = ("text", "instruction", "input", "output", "prompt", "completion", "messages", "conversations")
_UNUSED = ("system", "system_prompt", "history", "tools")  # fields that change the meaning of the others
_NO_TEXT = (
    b"PK",
    b"%PDF",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
)  # zip (docx), PDF, gzip, bzip2, xz, zstd
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


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
    """Reads texts from a list, a file or a data set.

    Args:
        source: A list of texts, returned unchanged; a file or data set, as for ``read_records``, but a text file is
            one text. Default: the train part of the embedded text.
        field: Name of a record's text field. Default: ``text``, or the fields of an instruction record joined by line
            breaks.
        limit: Largest number of records to read.

    Raises:
        ValueError: There is no such file or data set, it holds no text, or a record lacks the field.
    """
    if source is None:
        return load_texts().train
    if not isinstance(source, (str, PathLike)):
        return list(source)
    name, path = fspath(source), Path(source)
    if path.is_file() and _format_of(path) is None:
        texts = [_plain_text(path)]
    else:
        rows = enumerate(_rows(name, limit)[0], start=1)
        if field is None:
            texts = [_joined(_example(row, name, number)) for number, row in rows]
        else:
            texts = [_field(row, field, name, number) for number, row in rows]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{name} holds no text.")
    return texts


def read_records(source: str | PathLike[str], *, limit: int = 50_000, at_least: int = 1) -> list[Any]:
    """Reads texts or instruction records from a file or a data set.

    A warning says how many records exceed the limit.

    Args:
        source: A JSON, JSONL, CSV, TSV, Parquet or Arrow file (also compressed by gzip, xz, bzip2 or zstd); any other
            file, read as plain text in UTF-8; a folder that ``datasets`` can load; else the name of a Hub data set,
            ``NAME`` or ``NAME:CONFIG``, whose train split is streamed.
        limit: Largest number of texts or records.
        at_least: Number of texts wanted of a text file: lines, or else passages of 2,000 characters, are the texts
            where there are fewer paragraphs.

    Returns:
        Instruction records: mappings with ``instruction``, ``output`` and maybe ``input``; with ``prompt`` and
        ``completion``; or with ``messages`` of ``role`` and ``content``, into which ShareGPT's ``conversations`` are
        converted, up to the assistant's last reply. The ``text`` of other records. The paragraphs of a text file.

    Raises:
        ValueError: There is no such file or data set, it is empty or not in its format, or a record has none of these
            fields, or a null in them; the message names the record.
    """
    name, path = fspath(source), Path(source)
    found: list[Any]
    total: int | None
    if path.is_file() and _format_of(path) is None:
        found = _pieces(_plain_text(path), at_least)
        total = len(found)
    else:
        rows, total = _rows(name, limit)
        found = [_example(row, name, number) for number, row in enumerate(rows, start=1)]
        _warn_of_unused(rows, name)
    if total is None or total > limit:
        found, of = found[:limit], "more" if total is None else f"{total:,}"
        warnings.warn(f"{name}: only the first {limit:,} of {of} records are read; see limit.", stacklevel=2)
    if not any(text.strip() for text in map(_joined, found)):
        raise ValueError(f"{name} holds no text.")
    return found


def _plain_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {_reason(error)}") from error
    if "\0" in text:
        raise ValueError(f"cannot read {path}: it holds NUL characters, so it is no text in UTF-8.")
    return text


def _pieces(text: str, at_least: int) -> list[str]:
    """Returns the paragraphs of a text, its lines, or passages: the first of these that are enough."""
    pieces: list[str] = []
    for pattern in (r"\n\s*\n", r"\n"):
        pieces = [piece for piece in re.split(pattern, text) if piece.strip()]
        if len(pieces) >= at_least:
            return pieces
    return re.findall(rf"\S.{{1,{_PASSAGE}}}(?=\s|$)|\S+", text, flags=re.DOTALL)


def _example(row: Mapping[str, Any], name: str, number: int) -> Any:  # noqa: ANN401
    """Returns a row as a text or an instruction record; see ``read_records``."""
    there = {key for key, value in row.items() if value is not None}
    for wanted in ({"instruction", "output"}, {"prompt", "completion"}):
        if wanted <= there and all(isinstance(row[key], (str, int, float)) for key in wanted):
            return {key: str(row[key]) for key in row if key in (*wanted, "input") and row[key] is not None}
    if {"prompt", "completion"} <= there:
        return {"messages": _messages([*row["prompt"], *row["completion"]], name, number)}
    for key in ("messages", "conversations"):
        if key in there:
            return {"messages": _messages(row[key], name, number)}
    if "text" in there and isinstance(row["text"], (str, int, float)):
        return str(row["text"])
    odd = [
        key for key in ("text", "instruction", "output") if key in there and not isinstance(row[key], (str, int, float))
    ]
    if odd:
        raise ValueError(f"{name}, record {number}: {odd[0]} must be text, got {row[odd[0]]!r:.80}.")
    nulls = [key for key in row if key in _FIELDS and row[key] is None]
    if nulls:
        raise ValueError(f"{name}, record {number}: {' and '.join(nulls)} is null; remove the record.")
    raise ValueError(
        f"{name}, record {number}: it has none of text, instruction and output, prompt and completion, messages, but "
        f"{', '.join(row)}."
    )


def _warn_of_unused(rows: Iterable[Mapping[str, Any]], name: str) -> None:
    counts = {key: sum(bool(row.get(key)) for row in rows) for key in _UNUSED}
    counts["label"] = sum(row.get("label") is False for row in rows)  # of KTO's data: a completion to avoid
    if unused := {key: n for key, n in counts.items() if n}:
        said = " and ".join(f"{key} (of {n:,} records)" for key, n in unused.items())
        warnings.warn(
            f"{name}: {said} is left out; put it into the prompt or the messages, if it counts.", stacklevel=3
        )


def _messages(turns: Any, name: str, number: int) -> list[dict[str, str]]:  # noqa: ANN401
    """Returns a conversation as messages with ``role`` and ``content``; ShareGPT has ``from`` and ``value``."""
    found = []
    for turn in turns if isinstance(turns, list) else [turns]:
        given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
        role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
        if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
            content = "".join(str(part["text"]) for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{name}, record {number}: a message needs a role and a text, got {turn!r:.80}.")
        found.append({"role": _ROLES.get(role, role), "content": content})
    while found and found[-1]["role"] != "assistant":
        found.pop()
    if len(found) < 2:
        raise ValueError(f"{name}, record {number}: the conversation has no reply of the assistant.")
    return found


def _joined(example: Any) -> str:  # noqa: ANN401
    """Returns the texts of an example, joined by line breaks."""
    if isinstance(example, str):
        return example
    if "messages" in example:
        return "\n".join(message["content"] for message in example["messages"])
    return "\n".join(example[key] for key in _FIELDS if example.get(key))


def _field(row: Mapping[str, Any], field: str, name: str, number: int) -> str:
    if row.get(field) is None:
        raise ValueError(f"{name}, record {number}: it has no field {field}, or null there, but {', '.join(row)}.")
    return str(row[field])


def _format_of(path: Path) -> str | None:
    """Returns the loader of ``datasets`` for a file, by its suffix; None for plain text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".xz", ".bz2", ".zst"):
        suffixes.pop()
    return _LOADERS.get(suffixes[-1]) if suffixes else None


def _rows(name: str, limit: int) -> tuple[list[Mapping[str, Any]], int | None]:
    """Returns the first rows of a file, a folder or a Hub data set, and the number of all; None if that is unknown.

    Raises:
        ValueError: It cannot be read; the message names the reason in one line.
    """
    import datasets

    path = Path(name)
    if not name.strip():
        raise ValueError(f"the name of a file or data set must not be empty, got {name!r}.")
    if not path.exists() and (
        _format_of(path) or path.suffix == ".txt" or name.startswith((".", "/", "~")) or name.endswith("/")
    ):
        raise ValueError(f"there is no file {name}.")
    try:
        with _quiet_datasets(), tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header or names does not match")  # of pandas
            if path.exists():
                data = _load_local(path, cache)
                return data.select(range(min(limit, len(data)))).to_list(), len(data)
            repository, _, config = name.partition(":")
            stream = datasets.load_dataset(
                repository, config or None, split="train", streaming=True, trust_remote_code=False
            )
            rows = list(islice(stream, limit + 1))
            return rows[:limit], None if len(rows) > limit else len(rows)
    except (OSError, RuntimeError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        if path.exists() and "corresponds to no data" in str(error):
            return [], 0
        if path.exists():
            raise ValueError(f"cannot read {name}: {_reason(error)}") from error
        raise ValueError(f"{name} is neither a file nor a reachable data set on the Hub ({_reason(error)}).") from error


def _load_local(path: Path, cache: str) -> Any:  # noqa: ANN401
    import datasets

    if path.is_file():
        loader = _format_of(path)
        options: dict[str, Any] = {}
        if path.stat().st_size == 0:
            return datasets.Dataset.from_list([])
        if loader == "csv":
            # with index columns, a text with a comma that is not quoted would lose all before it
            options = {"keep_default_na": False, "index_col": False}
            options["sep"] = "\t" if ".tsv" in path.name.lower() else ","
        options |= {"data_files": str(path), "cache_dir": cache}
        return datasets.load_dataset(loader, split="train", trust_remote_code=False, **options)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, dict) and "train" not in saved:
            raise ValueError(f"it has no split train, but {', '.join(saved)}; name the folder of a split")
        return saved["train"] if isinstance(saved, dict) else saved
    return datasets.load_dataset(str(path), split="train", cache_dir=cache, trust_remote_code=False)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hides the progress bars and messages of ``datasets``; its errors are raised anyway."""
    import datasets

    level, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """Returns the cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        if error.object.startswith((b"\xff\xfe", b"\xfe\xff")):
            return "it is in UTF-16; convert it, such as by iconv -f utf-16 -t utf-8"
        if error.object.startswith(_NO_TEXT) or b"\0" in error.object:
            return "it is no text file; give its text in UTF-8, decompressed"
        return f"it is not in UTF-8 (byte 0x{byte:02x}); convert it, such as by iconv -f latin1 -t utf-8"
    return (str(error).splitlines() or [type(error).__name__])[0]
