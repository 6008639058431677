from __future__ import annotations

from rankadaptor_optuna.views.tables import from_columns, markdown_table, text_table

TABLE = from_columns({"name": ["a", "bcdef"], "n": [1, 20]})


def test_columns_become_rows_of_text():
    assert TABLE == [["name", "n"], ["a", "1"], ["bcdef", "20"]]


def test_a_text_table_aligns_names_left_and_numbers_right():
    assert text_table(TABLE).splitlines() == ["name    n", "---------", "a       1", "bcdef  20"]


def test_a_markdown_table_aligns_names_left_and_numbers_right():
    assert markdown_table(TABLE).splitlines() == ["| name | n |", "| --- | ---: |", "| a | 1 |", "| bcdef | 20 |"]


def test_cells_of_others_stay_in_their_cell():
    table = [["a", "b"], ["x | y\n| z", "\x1b[2J<b>"]]
    assert text_table(table).splitlines()[2].split("  ") == ["x | y | z", "\\x1b[2J<b>"]
    assert markdown_table(table).splitlines()[2] == r"| x \| y \| z | \\x1b\[2J&lt;b&gt; |"
