from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftModel

from rankadaptor_optuna import create_study
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.database.attributes import RECIPE_ATTR
from rankadaptor_optuna.jobs import compare as compare_module
from rankadaptor_optuna.jobs import quickstart as module
from rankadaptor_optuna.jobs.quickstart import quickstart
from rankadaptor_optuna.jobs.recipe import PRESETS, Recipe
from rankadaptor_optuna.jobs.results import DENSE, NONE, OURS, UNIFORM
from rankadaptor_optuna.pruning import load_pruned
from rankadaptor_optuna.ranks import Ranks


@pytest.fixture(scope="module")
def first(make_model, tiny, texts, tmp_path_factory):
    """The recipe, the folder and the result of a first run on texts that are long enough for continuations."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "text.txt").write_text("\n\n".join(f"{a} {b} {a}" for a in texts for b in texts[:4]))
    evaluation = {"report_limit": 4}
    data = {"train": str(folder / "text.txt"), "block_length": 32, "report_blocks": 5}
    values = {**tiny[0], "preset": "quickstart", "data": data, "evaluation": evaluation}
    recipe = Recipe.from_dict(values)
    return recipe, folder / "out", quickstart(recipe, folder / "out", trials=2, say=lambda line: None)


@pytest.fixture
def nothing_is_computed(monkeypatch):
    monkeypatch.setattr(compare_module, "_recover_and_measure", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(module, "train_adapter", lambda *args, **_: pytest.fail("trained again"))


def test_the_preset_is_the_quick_one_with_settings_of_its_report():
    quick, preset = PRESETS["quick"].to_dict(), PRESETS["quickstart"].to_dict()
    quick["data"]["report_blocks"] = 24
    quick["evaluation"] |= {"report_tasks": ("continuation",), "report_limit": 60}
    assert preset == quick


def test_it_compares_dense_pruned_uniform_and_recommended(first):
    _, out, found = first
    assert [row.method for row in found.comparison.rows] == [DENSE, NONE, UNIFORM, OURS]
    for row in found.comparison.rows:
        (accuracies,) = row.accuracies.values()
        assert len(accuracies) == len(row.losses) == (1 if row.method in (DENSE, NONE) else 3)
        assert set(row.accuracies) == {"continuation"}
        assert all(4 * accuracy in range(5) for accuracy in accuracies)
    assert found.exported.loss < found.exported.loss_before
    for name in ("settings.json", "study.db", "recommendation.json", "results.json", "compare/compare.json"):
        assert (out / name).exists()


def test_the_adapter_is_the_recommended_ranks_on_the_pruned_model(first):
    _, out, found = first
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((out / "pruned").resolve())
    adapted = PeftModel.from_pretrained(load_pruned(out / "pruned"), out / "adapter")
    ranks = {int(name.split(".")[4]): m.r["default"] for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert {layer: ranks[layer] for layer in found.search.recommendation.ranks} == found.search.recommendation.ranks


def test_running_again_computes_nothing(first, nothing_is_computed):
    recipe, out, found = first
    again = quickstart(recipe, out, trials=2, say=lambda line: None)
    assert again.comparison == found.comparison
    assert (again.exported.loss, again.exported.loss_before) == (found.exported.loss, found.exported.loss_before)
    assert len(again.search.study.trials) == 2


def test_a_report_text_that_is_too_short_is_refused_before_any_pruning(first, tmp_path, monkeypatch):
    recipe, parts = first[0], first[0].read_data()
    monkeypatch.setattr(Recipe, "prune", lambda *args: pytest.fail("pruned"))
    monkeypatch.setattr(Recipe, "read_data", lambda self: replace(parts, report=["short"]))
    with pytest.raises(ValueError, match="too few for one block of 32"):
        quickstart(recipe, tmp_path / "out", trials=1, say=lambda line: None)
    assert not (tmp_path / "out" / "pruned").exists()


def test_where_every_layer_is_recommended_rank_0_no_adapter_is_written(first, tmp_path, monkeypatch):
    _, out, found = first
    shutil.copytree(out, tmp_path / "out")
    none = Ranks.uniform(found.search.space.with_fixed(found.search.recommendation.ranks), 0)
    searched = replace(
        found.search,
        recommendation=replace(found.search.recommendation, ranks=Ranks({1: 0, 2: 0}), all_ranks=none),
        out=tmp_path / "out",
    )
    monkeypatch.setattr(module, "train_adapter", lambda *args, **_: pytest.fail("trained"))
    exported = module._exported(searched, lambda line: None)
    assert exported.loss == exported.loss_before == pytest.approx(found.exported.loss_before)


def test_an_adapter_of_other_ranks_is_replaced(first, tmp_path, monkeypatch):
    recipe, out, _ = first
    shutil.copytree(out, tmp_path / "out")
    trained = []
    monkeypatch.setattr(module, "train_adapter", lambda job, ranks, folder, base: trained.append(ranks) or (1.0, 2.0))
    searched = quickstart(recipe, tmp_path / "out", trials=2, say=lambda line: None).search
    assert trained == []
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    results["adapter"]["ranks"] = {"1": 2, "2": 2}
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    again = quickstart(recipe, tmp_path / "out", trials=2, say=lambda line: None)
    assert trained == [searched.recommendation.ranks]
    assert (again.exported.loss, again.exported.loss_before) == (1.0, 2.0)


def test_its_study_is_compared_and_exported_by_the_commands(first, tmp_path):
    _, out, found = first
    arguments = ["--storage", f"sqlite:///{out / 'study.db'}", "--pruned", str(out / "pruned"), "--trust-study"]
    shutil.copytree(out / "compare", tmp_path / "c")  # references are added to the rows that it has
    assert main(["compare", "--study", "quickstart", "--out", str(tmp_path / "c"), "--seeds", "2", *arguments]) == 0
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())["rows"]
    assert len(rows) == 6
    assert rows[1]["losses"] == found.comparison.row(UNIFORM).losses[:2]
    assert main(["export", str(tmp_path / "e"), "--study", "quickstart", *arguments]) == 0
    assert (tmp_path / "e" / "rank_pattern.json").exists()


def test_a_quickstart_of_an_earlier_version_goes_on(model, tokenizer, tmp_path, monkeypatch):
    """Its folder and its study hold the quickstart's own format of settings."""
    old = json.loads((Path(__file__).parent / "data" / "quickstart-0.json").read_text())
    out, url = tmp_path / "out", f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    model.save_pretrained(out / "pruned")
    tokenizer.save_pretrained(out / "pruned")
    (out / "settings.json").write_text(json.dumps(old))
    (out / "results.json").write_text(json.dumps({"dense": {"loss": 2.0}, "adapter": "ranks 8,8"}))
    create_study(storage=url, study_name="quickstart", recipe=old, direction="minimize")
    recipe, seen = Recipe.from_dict(old), []
    monkeypatch.setattr(module, "compare", lambda *args, **_: seen.append(args))
    monkeypatch.setattr(module, "train_adapter", lambda *args, **_: (1.0, 2.0))
    monkeypatch.setattr(Recipe, "read_data", lambda recipe: texts_of(tokenizer))
    found = quickstart(recipe, out, trials=1, say=lambda line: None)
    assert len(found.search.study.trials) == 1
    assert found.search.study.user_attrs[RECIPE_ATTR] == old
    assert seen[0][:2] == (url, "quickstart")
    assert found.exported.loss == 1.0
    with pytest.raises(ValueError, match=r"--out .* belongs to other settings: pruning\.ratio was 0\.3, now 0\.25"):
        quickstart(PRESETS["quickstart"], out, trials=1)


def texts_of(tokenizer):
    from rankadaptor_optuna.jobs.recipe import Parts

    texts = ["rank of a layer " * 300] * 4  # continuation needs four
    return Parts(texts, texts, texts)
