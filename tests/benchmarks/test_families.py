from __future__ import annotations

import json

import pytest

from benchmarks.families import matrix
from benchmarks.report import FOLDER


@pytest.mark.parametrize("family", ["gpt_neox", "olmoe"])
def test_a_family_is_right_or_refused(family):
    cells, seconds = matrix.run(family)
    assert 0 < seconds < matrix.LIMIT
    assert cells["whole blocks"] == cells["recovery"] == cells["export and reload"] == matrix.RIGHT
    assert cells["hidden channels"].startswith("cannot prune ")
    assert bool(cells["without adapters"]) == (family == "olmoe")


def test_a_fault_is_wrong_and_a_refusal_is_not():
    def refuse():
        raise ValueError("no such layer; name another.")

    def fail():
        raise KeyError("layer")

    def differ():
        raise AssertionError("other logits")

    assert matrix.cell(refuse) == "no such layer; name another."
    assert matrix.cell(fail).startswith("WRONG: KeyError in test_families.py:")
    assert "other logits" in matrix.cell(differ)
    assert matrix.cell(lambda: None) == "right"


def test_a_family_without_end_is_wrong(monkeypatch):
    monkeypatch.setattr(matrix, "LIMIT", 0.0)
    cells, _ = matrix.run("llama")
    assert set(cells.values()) == {"WRONG: no end after 0 seconds"}


def test_the_table_in_the_docs_is_that_of_the_results_and_nothing_is_wrong():
    found = json.loads((FOLDER / "families.json").read_text())
    assert matrix.TABLE.read_text() == matrix.table(found["rows"], found["versions"])
    assert len(found["rows"]) >= 30
    assert matrix.WRONG not in matrix.TABLE.read_text()
