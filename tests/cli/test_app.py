from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from rankadaptor_optuna import __version__, create_study
from rankadaptor_optuna.cli import main


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a quickstart that must refuse its input in one line and write nothing; returns that line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKADAPTOR_CACHE", str(tmp_path / "cache"))

    def run(*arguments, out="out"):
        before = sorted(tmp_path.rglob("*"))
        try:
            code = main(["quickstart", "--out", str(tmp_path / out), *arguments])
        except SystemExit as stop:
            code = stop.code
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert sorted(tmp_path.rglob("*")) == before
        assert "Traceback" not in "\n".join(lines)
        assert len(lines) == 1, lines
        assert re.match(r"rankadaptor( quickstart)?: error: ", lines[0])
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0"], "got 0"),
        (["--ratio", "1"], "got 1"),
        (["--ratio", "-1"], "got -1"),
        (["--ratio", "1.5"], "got 1.5"),
        (["--ratio", "nan"], "got nan"),
        (["--ratio", "half"], "'half'"),
        (["--candidates", ""], "must not be empty"),
        (["--candidates", "8,4"], "strictly increasing, got [8, 4]"),
        (["--candidates", "-2,4"], "-2"),
        (["--candidates=-2,4"], "got [-2, 4]"),
        (["--candidates", "x"], "'x'"),
        (["--candidates", "0"], "got [0]"),
        (["--budget", "nonsense"], "'nonsense'"),
        (["--budget", "0"], "'0'"),
        (["--budget", "uniform:1"], "below the cheapest configuration"),
        (["--budget", "-1"], "'-1'"),
        (["--granularity", "module"], "'module'"),
        (["--trials", "0"], "at least 1, got 0"),
        (["--trials", "-3"], "at least 1, got -3"),
        (["--trials", "many"], "'many'"),
        (["--steps", "0"], "steps must be positive, got 0"),
        (["--seed", "-1"], "at least 0, got -1"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_that_names_it(refused, arguments, says):
    assert says in refused(*arguments)


def test_a_model_that_is_nowhere_is_named(refused, tmp_path):
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
    assert "cannot load a model from" in refused("--model", str(tmp_path / "half"))


def test_the_out_of_other_settings_is_left_alone(refused, tmp_path):
    from rankadaptor_optuna.jobs.quickstart import Quickstart

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps(Quickstart(out=tmp_path, ratio=0.3).recipe()))
    line = refused()
    assert "out belongs to other settings: pruning.ratio was 0.3, now 0.25. Use those" in line


def test_the_out_of_another_granularity_is_left_alone(refused, tmp_path):
    from rankadaptor_optuna.jobs.quickstart import Quickstart

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps(Quickstart(out=tmp_path).recipe()))
    assert "space.granularity was layer, now sublayer" in refused("--granularity", "sublayer")


def test_a_study_of_other_settings_is_refused(refused, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    create_study(storage=url, study_name="quickstart", recipe={"seed": 1})
    line = refused("--storage", url)
    assert "study 'quickstart' belongs to other settings" in line
    assert "seed was 1, now 0" in line


def test_a_folder_with_something_else_in_it_is_left_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    assert "mine is not empty" in refused(out="mine")


def test_an_out_that_is_a_file_is_left_alone(refused, tmp_path):
    (tmp_path / "mine").write_text("irreplaceable")
    assert "mine" in refused(out="mine")


def test_a_storage_that_cannot_be_opened_is_refused_before_the_model_is_even_looked_for(refused, tmp_path):
    model = str(tmp_path / "no-such-model")
    assert "cannot open the storage" in refused("--storage", "sqlite:////no/such/folder/study.db", "--model", model)


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_a_missing_or_unknown_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(config, say):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankadaptor_optuna.jobs.quickstart.run", interrupt)
    assert main(["quickstart"]) == 130
    assert "Run the same command again to go on" in capsys.readouterr().err


def test_help_is_told_without_loading_torch():
    code = "import sys; from rankadaptor_optuna.cli import main\ntry: main(['quickstart', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--candidates" in told


@pytest.fixture
def dense_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


TINY = ["--n-samples", "4", "--sample-length", "32", "--multiple-of", "8"]


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        (["--ratio", "0.3"], "30.00% asked"),
        (["--method", "shortened", "--ratio", "0.25"], "25.00% of the blocks' parameters (25.00% asked)"),
        (["--method", "slimgpt", "--ratio", "0.2"], "20.00% asked"),
        (["--preset", "llm-pruner"], "12.50% asked"),
        (["--structure", "hidden", "--ratio", "0.25"], "25.00% of the blocks'"),
    ],
)
def test_prune_writes_a_checkpoint_that_opens_and_says_what_went(dense_folder, tmp_path, capsys, arguments, gone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["prune", str(dense_folder), str(tmp_path / "out"), *arguments, *TINY]) == 0
    out = capsys.readouterr().out
    assert gone in out
    assert len(re.findall(r"^ +\d+ ( +\d+\.\d%){4}$", out, flags=re.M)) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert f"-> {sum(p.numel() for p in model.parameters()):,}." in out
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0.99"], "largest possible ratio is 0."),
        (["--ratio", "2"], "ratio must lie between 0 and 1, got 2.0"),
        (["--criterion", "ppl"], "criterion 'ppl' is unknown to llm-pruner"),
        (["--calibration", "nowhere.txt"], "nowhere.txt is neither a file"),
    ],
)
def test_prune_refuses_in_one_line_and_writes_nothing(dense_folder, tmp_path, capsys, arguments, says):
    assert main(["prune", str(dense_folder), str(tmp_path / "out"), *arguments, *TINY]) == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("rankadaptor prune: error: ")
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


def test_prune_does_not_write_over_something(dense_folder, capsys):
    assert main(["prune", str(dense_folder), str(dense_folder)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_import_checkpoint_converts_or_refuses_in_one_line(model, tokenizer, tmp_path, capsys):
    import torch

    torch.save({"model": model, "tokenizer": tokenizer}, tmp_path / "model.bin")
    torch.save({"model": print}, tmp_path / "bad.bin")
    assert main(["import-checkpoint", str(tmp_path / "model.bin"), str(tmp_path / "out"), "--allow-pickle"]) == 0
    assert "4 layers" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["import-checkpoint", str(tmp_path / "bad.bin"), str(tmp_path / "other"), "--allow-pickle"]) == 2
    assert "print" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
