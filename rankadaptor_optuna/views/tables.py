"""Tables for a terminal and in Markdown; a table is a list of rows, the header first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankadaptor_optuna.checks.plain_text import markdown, one_line

Table = list[list[str]]


def from_columns(columns: Mapping[str, Sequence[Any]]) -> Table:
    """Returns the table with these columns, by header."""
    return [list(columns), *([str(cell) for cell in row] for row in zip(*columns.values(), strict=True))]


def text_table(table: Table) -> str:
    """Returns a table for a terminal: the first column aligned left, the others right; each cell in one line."""
    table = [[one_line(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for first, *cells in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(table: Table) -> str:
    """Returns a table in Markdown, cells as they are: the first column aligned left, the others right."""
    head, *body = [f"| {' | '.join(map(markdown, row))} |" for row in table]
    return "\n".join([head, "| --- |" + " ---: |" * (len(table[0]) - 1), *body])
