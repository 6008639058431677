from __future__ import annotations

import json
import re

import pytest

from rankadaptor_optuna.texts import load_texts, read_records, read_texts


def paragraphs(texts):
    return {" ".join(p.split()) for text in texts for p in re.split(r"\n\s*\n", text) if p.strip()}


def test_no_paragraph_stands_in_two_parts():
    texts = load_texts()
    train, validation, report = (paragraphs(part) for part in (texts.train, texts.validation, texts.report))
    assert not train & validation
    assert not train & report
    assert not validation & report


def test_the_parts_are_eight_to_one_to_one():
    texts = load_texts()
    sizes = [len(part) for part in (texts.train, texts.validation, texts.report)]
    assert min(sizes) >= 10
    assert 0.78 < sizes[0] / sum(sizes) < 0.82
    assert abs(sizes[1] - sizes[2]) <= 1


def test_the_texts_are_the_same_each_time():
    assert load_texts() == load_texts()


def test_a_list_is_returned_as_it_is_and_nothing_means_the_embedded_text():
    assert read_texts(["one", "two"]) == ["one", "two"]
    assert read_texts() == load_texts().train


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "some.txt").write_text("one\ntwo\n")
    assert read_texts(tmp_path / "some.txt") == ["one\ntwo\n"]


def test_records_give_their_text_or_alpaca_fields_or_the_field_named(tmp_path):
    alpaca = {"instruction": "Add.", "input": "", "output": "3"}
    for name, record, field, expected in (
        ("text", {"text": "one", "id": 1}, None, "one"),
        ("alpaca", alpaca, None, "Add.\n3"),
        ("named", alpaca, "output", "3"),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(record) + "\n\n" + json.dumps(record))
        assert read_texts(file, field=field) == [expected] * 2
        assert read_texts(str(file), field=field, limit=1) == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "line 1: not a JSON record"),
        ("[1, 2]", "a record is list, not an object"),
        ('{"question": "?"}', "no field instruction, input, output, but question; name one"),
        ('{"text": " "}', "holds no text"),
        ("", "holds no text"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "bad.jsonl")


def test_what_is_neither_a_file_nor_a_reachable_data_set_is_refused_by_name():
    with pytest.raises(ValueError, match="no-one/no-such-data is neither a file nor a reachable data set"):
        read_texts("no-one/no-such-data")


def test_records_are_instructions_texts_or_the_paragraphs_of_a_text_file(tmp_path):
    record = {"instruction": "Add.", "output": "3"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"text": "one"}))
    assert read_records(tmp_path / "a.jsonl") == [record, "one"]
    assert read_records(tmp_path / "a.jsonl", limit=1) == [record]
    (tmp_path / "b.txt").write_text("one\ntwo\n\n\nthree\n")
    assert read_records(str(tmp_path / "b.txt")) == ["one\ntwo", "three\n"]
    (tmp_path / "c.jsonl").write_text('{"question": "?"}')
    with pytest.raises(ValueError, match="neither text nor instruction and output, but question"):
        read_records(tmp_path / "c.jsonl")
