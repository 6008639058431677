from __future__ import annotations

import gzip
import json
import re

import datasets
import pytest

from rankadaptor_optuna.llm.texts import load_texts, read_records, read_texts


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
        ("not json", "cannot read .*bad.jsonl: JSON parse error: Invalid value. in row 0"),
        ('{"text": "a"}\n{', "cannot read .*bad.jsonl: JSON parse error"),
        ('{"text": "a"}\n{"text": null}', "bad.jsonl, record 2: text is null; remove the record"),
        ('{"instruction": "a", "output": null}', "bad.jsonl, record 1: output is null; remove the record"),
        ('{"question": "?"}', "record 1: it has none of text, instruction and output, .*, messages, but question"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "record 1: the conversation has no reply of the assistant",
        ),
        ('{"messages": [{"role": "user"}]}', "record 1: a message needs a role and a text, got {'role': 'user'}"),
        ('{"text": " "}', "holds no text"),
        ("[]", "holds no text"),
        ('{"text": {"a": 1}}', "record 1: text must be text"),
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
    with pytest.raises(ValueError, match=r"none of text, instruction and output, prompt and completion, .* question"):
        read_records(tmp_path / "c.jsonl")


ALPACA = [{"instruction": "Add.", "input": "", "output": "3"}, {"instruction": "Say.", "input": "x", "output": "5"}]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", json.dumps([ALPACA[0], {**ALPACA[1], "output": 5}])),
        ("numbers.jsonl", "\n".join(json.dumps({**row, "output": int(row["output"])}) for row in ALPACA)),
        ("mark.json", "\ufeff" + json.dumps(ALPACA)),
        ("mark.jsonl", "\ufeff" + "\n".join(map(json.dumps, ALPACA))),
        ("a.csv", "instruction,input,output\nAdd.,,3\nSay.,x,5\n"),
        ("a.tsv", "instruction\tinput\toutput\nAdd.\t\t3\nSay.\tx\t5\n"),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ALPACA)).encode(), mtime=0)),
    ],
)
def test_instruction_records_are_read_from_any_common_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_records(tmp_path / name) == ALPACA
    assert read_texts(tmp_path / name) == ["Add.\n3", "Say.\nx\n5"]


def test_parquet_arrow_and_saved_data_sets_are_read(tmp_path):
    data = datasets.Dataset.from_list(ALPACA)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "splits")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for source in (tmp_path / "a.parquet", arrow, tmp_path / "saved", tmp_path / "splits"):
        assert read_records(source) == ALPACA


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "1 + 2 =", "completion": " 3"}, {"prompt": "1 + 2 =", "completion": " 3"}),
        ({"messages": TURNS}, {"messages": TURNS}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"messages": TURNS}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {"messages": TURNS}),
        ({"messages": [*TURNS, {"role": "user", "content": "Thanks"}]}, {"messages": TURNS}),
        ({"messages": [{"role": t["role"], "content": [{"text": t["content"]}]} for t in TURNS]}, {"messages": TURNS}),
    ],
)
def test_conversations_and_completions_are_instruction_records(tmp_path, record, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert read_records(tmp_path / "a.jsonl") == [expected]
    assert len(read_texts(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a"])
def test_a_file_in_another_encoding_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: it is not in UTF-8 \(byte 0xe9\); convert it"):
        read_records(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == read_records(tmp_path / "a.txt") == ["one"]


def test_a_text_without_blank_lines_is_split_by_lines_or_passages(tmp_path):
    lines = [f"line {i}" for i in range(12)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert read_records(tmp_path / "a.txt", at_least=10) == lines
    (tmp_path / "b.txt").write_text("word " * 6000)
    passages = read_records(tmp_path / "b.txt", at_least=10)
    assert len(passages) >= 10
    assert " ".join(passages).split() == ["word"] * 6000


def test_records_beyond_the_limit_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(1200)))
    with pytest.warns(UserWarning, match=r"a\.jsonl: only the first 1,000 of 1,200 records are read; see limit"):
        assert len(read_records(tmp_path / "a.jsonl", limit=1000)) == 1000


def test_a_csv_file_whose_rows_have_more_cells_than_its_head_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\na text, with a comma\n")
    with pytest.raises(ValueError, match=r"cannot read .*a\.csv: Length of header or names does not match"):
        read_records(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('text\n"a text, with a comma"\n')
    assert read_records(tmp_path / "a.csv") == ["a text, with a comma"]


@pytest.mark.parametrize("name", ["data/alpaca.jsonl", "text.txt", "./train", "/no/where", "data/"])
def test_a_mistyped_file_is_no_data_set_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=f"there is no file {name}"):
        read_records(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notepad.txt", "some text".encode("utf-16"), "it is in UTF-16"),
        ("no-mark.txt", "some text".encode("utf-16-le"), "it holds NUL characters"),
        ("text.txt.gz", gzip.compress(b"some text", mtime=0), "it is no text file"),
        ("paper.pdf", b"%PDF-1.4\n\xff", "it is no text file"),
    ],
)
def test_a_file_that_is_no_text_in_utf_8_is_called_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


def test_a_saved_data_set_without_a_train_split_names_its_splits(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="no split train, but test"):
        read_records(tmp_path / "saved")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"instruction": "a", "output": "b", "system": "You are a pirate."}, "system"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history"),
        ({"prompt": "a", "completion": "b", "label": False}, "label"),
    ],
)
def test_fields_that_change_the_meaning_are_not_left_out_unsaid(tmp_path, record, named, recwarn):
    (tmp_path / "data.jsonl").write_text(json.dumps({**record, "id": 7}))
    with pytest.warns(UserWarning, match=rf"{named} \(of 1 records\) is left out"):
        read_records(tmp_path / "data.jsonl")
    recwarn.clear()
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a", "label": 0, "system": None}))
    assert read_records(tmp_path / "data.jsonl") == ["a"]
    assert not recwarn


def test_a_field_that_is_no_text_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": ["a", "b"]}))
    with pytest.raises(ValueError, match="record 1: text must be text, got"):
        read_records(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="must not be empty"):
        read_records("")
