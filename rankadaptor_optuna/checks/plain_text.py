"""Text of other writers (names, cards, messages) made safe to show: no terminal escapes, no markup."""

from __future__ import annotations

import html
import re

_MARKUP = re.compile(r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def printable(text: object) -> str:
    r"""Returns a text with all control and formatting characters but line breaks spelled out, such as ``\x1b``."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def one_line(text: object) -> str:
    """Returns a text in one line, without control characters."""
    return printable(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """Returns a text in one line that Markdown shows as it is: markup and HTML are escaped."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))


def code_span(text: object) -> str:
    """Returns a text as a span of code in Markdown."""
    return f"`{one_line(text).replace('`', chr(39))}`"
