from __future__ import annotations

import math
import re
from dataclasses import fields

import peft
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.families.models import tiny_model
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.pruning.config import PruningConfig

TINY = ["--n-samples", "4", "--sample-length", "32", "--multiple-of", "8"]


@pytest.fixture
def dense_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [
        (["--ratio", "0.3"], "(30.00% asked)"),
        (["--method", "shortened", "--ratio", "0.25"], "25.00% of the blocks' parameters (25.00% asked)"),
        (["--preset", "llm-pruner"], "(12.50% asked)"),
        (["--structure", "hidden", "--ratio", "0.25"], "25.00% of the blocks'"),
    ],
)
def test_it_writes_a_checkpoint_that_opens_and_shows_the_removed_shares(
    dense_folder, tmp_path, capsys, arguments, removed
):
    from transformers import AutoTokenizer

    assert main(["prune", str(dense_folder), str(tmp_path / "out"), *arguments, *TINY]) == 0
    out = capsys.readouterr().out
    assert removed in out
    assert len(re.findall(r"^\d+ ( +\d+\.\d%){4}$", out, flags=re.M)) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert f"-> {sum(p.numel() for p in model.parameters()):,}." in out
    AutoTokenizer.from_pretrained(tmp_path / "out")
    before, after = re.search(
        r"^Perplexity on held-out text: ([\d.,]+) -> ([\d.,]+) \(not recovered\)\.$", out, re.M
    ).groups()
    assert float(before.replace(",", "")) != float(after.replace(",", ""))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0.99"], "largest possible ratio is 0."),
        (["--ratio", "2"], "ratio must lie between 0 and 1, got 2.0"),
        (["--criterion", "ppl"], "criterion 'ppl' is unknown to llm-pruner"),
        (["--calibration", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_written(dense_folder, tmp_path, capsys, arguments, says):
    assert main(["prune", str(dense_folder), str(tmp_path / "out"), *arguments, *TINY]) == 2
    (error,) = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error" in line]
    assert error.startswith("rankadaptor prune: error: ")
    assert says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "20"], "ratio must lie between 0 and 1, got 20.0"),
        (["--method", "shortened", "--steps", "2"], "steps=2 has no effect"),
        (["--calibration", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, arguments, says):
    from rankadaptor_optuna.recovery import models

    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["prune", "nobody/nothing", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_perplexities_are_those_of_the_dense_and_the_pruned_model(dense_folder, tmp_path):
    from rankadaptor_optuna.jobs.prune import prune_checkpoint
    from rankadaptor_optuna.llm.texts import load_texts
    from rankadaptor_optuna.recovery.data import token_blocks
    from rankadaptor_optuna.recovery.evaluate import block_losses
    from rankadaptor_optuna.recovery.models import load_model

    options = {"method": "shortened", "ratio": 0.25, "n_samples": 2, "sample_length": 16}
    result = prune_checkpoint(str(dense_folder), tmp_path / "out", options)
    for folder, perplexity in zip((dense_folder, tmp_path / "out"), result.perplexities, strict=True):
        model, tokenizer = load_model(folder, "auto")
        blocks = token_blocks(tokenizer, load_texts().validation, 128, 8)
        assert perplexity == pytest.approx(math.exp(block_losses(model, blocks).mean()), rel=1e-5)


def test_a_checkpoint_with_another_head_is_refused(tokenizer, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert main(["prune", str(tmp_path / "dense"), str(tmp_path / "out")]) == 2
    assert "it lacks lm_head.weight; a model with another head has no loss on text" in capsys.readouterr().err


def test_a_folder_that_cannot_be_pruned_is_refused_in_a_short_line(dense_folder, tokenizer, tmp_path, capsys):
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    config = peft.LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(dense_folder))
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for name, says in (
        ("nowhere", "there is no model folder"),
        ("t5", "for this kind of AutoModel: AutoModelForCausalLM.\n"),
        ("adapter", "LlamaForCausalLM carries a PEFT adapter already"),
    ):
        assert main(["prune", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(make_model, tokenizer, tmp_path, capsys):
    make_model(vocab_size=100).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert main(["prune", str(tmp_path / "dense"), str(tmp_path / "out")]) == 2
    assert "but the model knows 100 tokens: pass the model's own tokenizer" in capsys.readouterr().err


def test_it_does_not_write_over_something(dense_folder, capsys):
    assert main(["prune", str(dense_folder), str(dense_folder)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_every_option_of_pruning_is_an_option_of_the_command(capsys):
    assert main(["prune", "--help"]) == 0
    shown = capsys.readouterr().out
    for field in fields(PruningConfig):
        assert f"  --{field.name.replace('_', '-')} <" in shown
    assert "--structure <units|hidden>" in shown
