from __future__ import annotations

import json
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs.export import export
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.pruning import load_pruned


def adapters(model):
    return {n: m.r["default"] for n, m in model.named_modules() if getattr(m, "lora_A", None)}


def test_the_adapter_the_merged_model_and_the_pattern_agree(searched, tmp_path, ids):
    url, out, found = searched.storage, searched.out, searched.recommendation
    folder = tmp_path / "export"
    assert (
        export(url, "search", folder, pruned=out / "pruned", merge=True, trust_study=True).recommendation.ranks
        == found.ranks
    )
    adapted = PeftModel.from_pretrained(load_pruned(out / "pruned"), folder / "adapter").eval()
    merged = load_pruned(folder / "merged")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, load_pruned(out / "pruned")(ids).logits, atol=1e-3)
    fresh = get_peft_model(
        load_pruned(out / "pruned"), LoraConfig(**json.loads((folder / "rank_pattern.json").read_text()))
    )
    assert adapters(fresh) == adapters(adapted)
    layers = {int(name.split(".")[4]): rank for name, rank in adapters(adapted).items()}
    assert {layer: layers.get(layer, 0) for layer in found.ranks} == found.ranks
    AutoTokenizer.from_pretrained(folder / "adapter")


def test_one_alpha_for_all_layers_is_trained_recommended_and_written(searched, tmp_path):
    out = searched.out
    recipe = replace(searched.recipe, lora=replace(searched.recipe.lora, alpha=6))
    url = f"sqlite:///{tmp_path / 'fixed.db'}"
    found = search(recipe, tmp_path / "fixed", trials=1, storage=url, say=lambda line: None).recommendation
    assert set(found.alpha_pattern.values()) == {6}
    assert json.loads((tmp_path / "fixed" / "recommendation.json").read_text())["alpha_pattern"] == found.alpha_pattern
    export(url, "search", tmp_path / "export", pruned=out / "pruned", trust_study=True)
    adapted = PeftModel.from_pretrained(load_pruned(out / "pruned"), tmp_path / "export" / "adapter")
    pattern = LoraConfig(**json.loads((tmp_path / "export" / "rank_pattern.json").read_text()))
    for model in (adapted, get_peft_model(load_pruned(out / "pruned"), pattern)):
        scaled = {(m.r["default"], m.scaling["default"]) for m in model.modules() if getattr(m, "lora_A", None)}
        assert scaled
        assert all(scaling == 6 / rank for rank, scaling in scaled)


def test_more_steps_another_seed_or_no_pruned_model_at_hand(searched, tmp_path):
    def weights(name, *options):
        assert main(["export", str(tmp_path / name), "--storage", searched.storage, "--trust-study", *options]) == 0
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    pruned = ["--pruned", str(searched.out / "pruned")]
    first = weights("a", *pruned)
    assert len({first, weights("b", *pruned, "--steps", "5"), weights("c", *pruned, "--seed", "5")}) == 3
    assert weights("d") == first, "pruned again as the recipe says"


def test_what_cannot_be_exported_is_refused(searched, make_model, tokenizer, tmp_path, capsys):
    url = searched.storage
    make_model(num_hidden_layers=6).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("irreplaceable")
    for arguments, says in (
        (["x", "--study", "none"], "no study named 'none'"),
        (["x", "--steps", "0"], "steps must be positive, got 0"),
        (["x", "--pruned", str(tmp_path / "other")], "not those that study 'search' searched"),
        (["full"], "exists and is not empty"),
    ):
        assert main(["export", str(tmp_path / arguments[0]), "--storage", url, "--trust-study", *arguments[1:]]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
