from __future__ import annotations

import json

import pytest

from rankadaptor_optuna import create_study
from rankadaptor_optuna.cli import main


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a quickstart that must refuse its input in one line and write nothing; returns that line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKADAPTOR_CACHE", str(tmp_path / "cache"))

    def run(*arguments, out="out"):
        before = sorted(tmp_path.rglob("*"))
        assert main(["quickstart", "--out", str(tmp_path / out), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("rankadaptor quickstart: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0"], "got 0"),
        (["--ratio", "1"], "got 1"),
        (["--ratio", "nan"], "got nan"),
        (["--ratio", "half"], "'half'"),
        (["--candidates", ""], "must not be empty"),
        (["--candidates", "8,4"], "strictly increasing, got [8, 4]"),
        (["--candidates", "-2,4"], "got [-2, 4]"),
        (["--candidates=-2,4"], "got [-2, 4]"),
        (["--candidates", "x"], "'x'"),
        (["--budget", "nonsense"], "'nonsense'"),
        (["--budget", "0"], "'0'"),
        (["--budget", "uniform:1"], "below the cheapest configuration"),
        (["--granularity", "module"], "'module'"),
        (["--trials", "0"], "at least 1, got 0"),
        (["--steps", "0"], "steps must be positive, got 0"),
        (["--seed", "-1"], "at least 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_that_names_it(refused, arguments, says):
    assert says in refused(*arguments)


def test_a_missing_model_is_named(refused, tmp_path):
    assert "no-such-model" in refused("--model", str(tmp_path / "no-such-model"))


def test_a_model_of_another_kind_is_told_which_modules_were_looked_for(refused, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    line = refused("--model", str(tmp_path / "gpt2"))
    assert "cannot prune GPT2LMHeadModel: looked for model.layers[i].self_attn.{q,k,v,o}_proj" in line
    assert "but model.layers is missing" in line


def test_a_model_whose_file_is_cut_short_is_named(refused, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot load a causal language model from" in refused("--model", str(tmp_path / "half"))


def test_the_out_of_other_settings_is_left_alone(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps({"seed": 1}))
    line = refused()
    assert "out belongs to other settings: " in line
    assert "seed was 1, now 0" in line


def test_a_study_of_other_settings_is_refused(refused, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    create_study(storage=url, study_name="quickstart", recipe={"seed": 1})
    line = refused("--storage", url)
    assert "study 'quickstart' belongs to other settings" in line
    assert "seed was 1, now 0" in line


def test_a_folder_or_file_of_something_else_is_left_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    assert "mine is not empty" in refused(out="mine")
    assert "thesis.txt" in refused(out="mine/thesis.txt")


def test_a_storage_that_cannot_be_opened_is_refused_before_the_model_is_looked_for(refused, tmp_path):
    model = str(tmp_path / "no-such-model")
    assert "cannot open the storage" in refused("--storage", "sqlite:////no/such/folder/study.db", "--model", model)
