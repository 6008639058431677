from __future__ import annotations

import json
from dataclasses import replace

import optuna
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs.export import export
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.pruning import load_pruned


@pytest.fixture
def searched(model, tokenizer, texts, tmp_path):
    """A finished search: its storage, its folder and what it recommends."""
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(texts * 3))
    recipe = Recipe.from_dict(
        {
            "model": str(tmp_path / "dense"),
            "pruning": {"ratio": 0.2, "multiple_of": 8, "n_samples": 4, "sample_length": 32},
            "space": {"candidates": [0, 4, 8], "budget": "uniform:4"},
            "data": {"train": str(tmp_path / "text.txt"), "block_length": 32},
            "training": {"steps": 2},
        }
    )
    url = f"sqlite:///{tmp_path / 'study.db'}"
    found = search(recipe, tmp_path / "out", trials=4, storage=url, say=lambda line: None)
    return url, tmp_path / "out", found.recommendation


def adapters(model):
    return {n: m.r["default"] for n, m in model.named_modules() if getattr(m, "lora_A", None)}


def test_the_adapter_the_merged_model_and_the_pattern_agree(searched, tmp_path, ids):
    url, out, found = searched
    folder = tmp_path / "export"
    assert export(url, "search", folder, pruned=out / "pruned", merge=True).recommendation.ranks == found.ranks
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
    _, out, _ = searched
    recipe = Recipe.from_dict(json.loads((out / "settings.json").read_text()))
    recipe = replace(recipe, lora=replace(recipe.lora, alpha=6))
    url = f"sqlite:///{tmp_path / 'fixed.db'}"
    found = search(recipe, tmp_path / "fixed", trials=2, storage=url, say=lambda line: None).recommendation
    assert set(found.alpha_pattern.values()) == {6}
    assert json.loads((tmp_path / "fixed" / "recommendation.json").read_text())["alpha_pattern"] == found.alpha_pattern
    export(url, "search", tmp_path / "export", pruned=out / "pruned")
    adapted = PeftModel.from_pretrained(load_pruned(out / "pruned"), tmp_path / "export" / "adapter")
    pattern = LoraConfig(**json.loads((tmp_path / "export" / "rank_pattern.json").read_text()))
    for model in (adapted, get_peft_model(load_pruned(out / "pruned"), pattern)):
        scaled = {(m.r["default"], m.scaling["default"]) for m in model.modules() if getattr(m, "lora_A", None)}
        assert scaled
        assert all(scaling == 6 / rank for rank, scaling in scaled)


def test_the_card_says_study_ranks_budget_and_scores_without_a_password(searched, tmp_path):
    url, out, found = searched
    export(url, "search", tmp_path / "export", pruned=out / "pruned")
    card = (tmp_path / "export" / "README.md").read_text()
    for said in ("study `search`", "4 trials", "uniform:4", f"{found.cost:,.0f}", "Held-out loss", '"steps": 2'):
        assert said in card
    for layer, rank in found.ranks.items():
        assert f"| {layer} | {rank} |" in card


def test_more_steps_and_another_seed_are_another_training(searched, tmp_path):
    url, out, _ = searched
    for name, options in (("a", []), ("b", ["--steps", "3"]), ("c", ["--seed", "5"]), ("d", [])):
        arguments = ["--storage", url, "--pruned", str(out / "pruned"), *options]
        assert main(["export", str(tmp_path / name), *arguments]) == 0
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "abcd"]
    assert weights[0] == weights[3]
    assert len(set(weights)) == 3


def test_without_the_pruned_model_it_is_made_as_the_recipe_says(searched, tmp_path):
    url, out, _ = searched
    export(url, "search", tmp_path / "a", pruned=out / "pruned")
    export(url, "search", tmp_path / "b")
    names = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_what_cannot_be_exported_is_refused(searched, make_model, tokenizer, tmp_path, capsys):
    url, _, _ = searched
    make_model(num_hidden_layers=6).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    optuna.create_study(storage=url, study_name="plain")
    for arguments, says in (
        (["x", "--study", "none"], "no study named 'none'"),
        (["x", "--study", "plain"], "made without a recipe"),
        (["x", "--steps", "0"], "steps must be positive, got 0"),
        (["x", "--pruned", str(tmp_path / "other")], "not those that study 'search' searched"),
        (["out"], "exists and is not empty"),
    ):
        assert main(["export", str(tmp_path / arguments[0]), "--storage", url, *arguments[1:]]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
