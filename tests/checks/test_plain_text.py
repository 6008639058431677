from __future__ import annotations

import pytest

from rankadaptor_optuna.checks.plain_text import code_span, markdown, one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 模型 ± ✓", "Größe 模型 ± ✓"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b2J", "\\x9b2J"),
        ("abc\rd", "abc\\rd"),
        ("a\u202eb\u200bc", "a\\u202eb\\u200bc"),
        ("\ud800", "\\ud800"),
        ("a\nb", "a\nb"),
    ],
)
def test_control_and_formatting_characters_are_spelled_out(text, shown):
    assert printable(text) == shown


def test_a_line_break_starts_no_line_of_its_own():
    assert one_line("a\n# b\x1b") == "a # b\\x1b"


def test_markdown_shows_markup_and_html_as_they_are():
    assert markdown("a | [b](http://c) `d` <script> *e* & f_g _h_") == (
        r"a \| \[b\](http://c) \`d\` &lt;script&gt; \*e\* &amp; f_g \_h\_"
    )
    assert code_span("a`b\nc") == "`a'b c`"
