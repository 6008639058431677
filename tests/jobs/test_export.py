from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs import export as module
from rankadaptor_optuna.jobs.export import export
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.pruning import load_pruned
from rankadaptor_optuna.ranks import LoraSettings, Ranks
from rankadaptor_optuna.recovery.lora import lora_config


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


@pytest.fixture(scope="module")
def shortened(make_model, tokenizer, tiny, tmp_path_factory):
    """A search of a model that lost whole blocks; layers may have rank 0."""
    folder = tmp_path_factory.mktemp("shortened")
    make_model(num_hidden_layers=8).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    values = {
        **tiny[0],
        "model": str(folder / "dense"),
        "training": {"steps": 2},
        "pruning": {"method": "shortened", "ratio": 0.25, "n_samples": 2, "sample_length": 16},
        "space": {"candidates": [0, 2, 4, 8], "budget": "uniform:4"},
    }
    return search(Recipe.from_dict(values), folder / "out", trials=3, say=lambda line: None)


def recommending(monkeypatch, ranks):
    real = module.recommend
    found = lambda study: replace(real(study), ranks=Ranks(ranks), all_ranks=Ranks(ranks))  # noqa: E731
    monkeypatch.setattr(module, "recommend", found)


def test_an_adapter_names_the_pruned_model_that_is_written_beside_it(shortened, tmp_path, ids, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recommending(monkeypatch, dict.fromkeys(range(6), 4))
    exported = export(shortened.storage, "search", Path("export"), say=lambda line: None, trust_study=True)
    assert exported.base == str(tmp_path / "export" / "pruned")
    monkeypatch.chdir("/")
    adapter = tmp_path / "export" / "adapter"
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    assert len(adapted.base_model.model.model.layers) == 6
    expected = PeftModel.from_pretrained(load_pruned(shortened.out / "pruned"), adapter).eval()
    torch.testing.assert_close(adapted(ids).logits, expected(ids).logits)
    assert trained_parameters(expected) == exported.recommendation.cost
    dense = AutoModelForCausalLM.from_pretrained(shortened.recipe.model)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.6\."):
        PeftModel.from_pretrained(dense, adapter)
    shutil.move(tmp_path / "export", tmp_path / "moved")
    with pytest.raises(OSError, match="export/pruned"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "moved" / "adapter")


def test_layers_of_rank_0_have_no_adapter_wherever_it_is_loaded_or_pasted(shortened, tmp_path, monkeypatch):
    ranks = {0: 8, 1: 0, 2: 4, 3: 0, 4: 4, 5: 8}
    recommending(monkeypatch, ranks)
    found = export(
        shortened.storage, "search", tmp_path / "export", pruned=shortened.out / "pruned", trust_study=True
    ).recommendation
    pasted = (
        found.lora_arguments,
        json.loads((tmp_path / "export" / "rank_pattern.json").read_text()),
    )
    models = [get_peft_model(load_pruned(shortened.out / "pruned"), LoraConfig(**given)) for given in pasted]
    models.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export" / "adapter", is_trainable=True))
    for model in models:
        assert trained_parameters(model) == shortened.space.cost(ranks) == shortened.space.budget
        layers = {int(name.split("layers.")[1].split(".")[0]): rank for name, rank in adapters(model).items()}
        assert layers == {layer: rank for layer, rank in ranks.items() if rank}
    answer = json.loads((shortened.out / "recommendation.json").read_text())
    model = get_peft_model(load_pruned(shortened.out / "pruned"), LoraConfig(**answer["lora_arguments"]))
    assert trained_parameters(model) == answer["trainable_parameters"]


def test_an_export_without_any_adapter_is_refused(shortened, tmp_path, monkeypatch):
    recommending(monkeypatch, dict.fromkeys(range(6), 0))
    with pytest.raises(ValueError, match="study 'search' recommends rank 0 in every layer"):
        export(shortened.storage, "search", tmp_path / "export", trust_study=True)
    assert not (tmp_path / "export").exists()


def test_an_interrupted_export_goes_on_with_the_model_that_it_pruned(shortened, tmp_path, monkeypatch):
    real = module.train_adapter
    monkeypatch.setattr(module, "train_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(shortened.storage, "search", tmp_path / "export", trust_study=True)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["pruned"]
    monkeypatch.setattr(module, "train_adapter", real)
    monkeypatch.setattr(Recipe, "prune", lambda *args: pytest.fail("pruned again"))
    assert export(shortened.storage, "search", tmp_path / "export", trust_study=True).base == str(
        tmp_path / "export" / "pruned"
    )


@pytest.mark.parametrize("left", [[".pruned." + "0" * 32], ["pruned", "adapter.part"]], ids=" ".join)
def test_an_export_goes_on_after_a_kill_while_it_wrote(shortened, tmp_path, left):
    export(shortened.storage, "search", tmp_path / "first", trust_study=True)
    folder = tmp_path / "export"
    for name in left:
        shutil.copytree(tmp_path / "first" / ("pruned" if "pruned" in name else "adapter"), folder / name)
    export(shortened.storage, "search", folder, trust_study=True)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "pruned", "rank_pattern.json"]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def trained_parameters(model):
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_what_cannot_be_exported_is_refused(searched, make_model, tokenizer, tmp_path, capsys):
    url = searched.storage
    make_model(num_hidden_layers=6).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("irreplaceable")
    for arguments, says in (
        (["x", "--study", "none"], "no study named 'none'"),
        (["x", "--steps", "0"], "steps must be positive, got 0"),
        (["x", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["x", "--pruned", str(tmp_path / "other")], "not those that study 'search' searched"),
        (["full"], "exists and is not empty"),
    ):
        assert main(["export", str(tmp_path / arguments[0]), "--storage", url, "--trust-study", *arguments[1:]]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_modules_with_full_names_lacks_weights_on_a_deeper_model_too(tmp_path, recwarn):
    def gpt2(n_layers):
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=n_layers, n_head=2, n_positions=32))

    space = RankSpace.from_model(gpt2(2), (0, 2, 4), "uniform:2")
    job, ranks = SimpleNamespace(space=space, lora=LoraSettings(space.targets)), Ranks({0: 4, 1: 0})
    adapted = get_peft_model(gpt2(2), lora_config(ranks, job.lora))
    module._adapt_further_layers(adapted.peft_config["default"], job, ranks)
    adapted.save_pretrained(tmp_path)
    assert trained_parameters(PeftModel.from_pretrained(gpt2(2), tmp_path)) == space.cost(ranks)
    assert not any("missing adapter keys" in str(each.message) for each in recwarn)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*h\.2\."):
        PeftModel.from_pretrained(gpt2(3), tmp_path)


def test_an_export_on_other_data_than_the_study_had_says_so(searched, tmp_path):
    data = Path(searched.recipe.data.train)
    before = data.read_text()
    data.write_text("\n\n".join(reversed(before.split("\n\n"))))
    try:
        with pytest.warns(UserWarning, match="the data has changed since study 'search'"):
            export(searched.storage, "search", tmp_path / "e", pruned=searched.out / "pruned", trust_study=True)
    finally:
        data.write_text(before)
