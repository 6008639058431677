from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest

from rankadaptor_optuna.database.attributes import RECIPE_ATTR
from rankadaptor_optuna.jobs import compare as compare_module
from rankadaptor_optuna.jobs.compare import compare
from rankadaptor_optuna.jobs.export import export
from rankadaptor_optuna.jobs.old_recipes import FORMAT
from rankadaptor_optuna.jobs.recipe import PRESETS, Recipe
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.jobs.stored import stored_recipe, stored_study

DATA = Path(__file__).parent / "data"


def kept(name):
    return json.loads((DATA / name).read_text())


def test_a_recipe_of_format_1_has_its_settings_and_todays_defaults():
    recipe = Recipe.from_dict(kept("recipe-1.json"))
    expected = {
        "preset": "paper",
        "model": "some/model",
        "dtype": "bfloat16",
        "seed": 3,
        "report_every": 20,
        "pruner": "hyperband",
        "space": {"candidates": [0, 4, 8], "budget": 100000, "granularity": "sublayer"},
        "evaluation": {"tasks": {"arc_easy": 1, "piqa": 0.5}, "metric": "margin", "limit": 100},
    }
    assert recipe == Recipe.from_dict(expected)
    assert recipe.to_dict()["format"] == FORMAT


def test_a_quickstarts_own_format_is_the_preset_with_its_settings():
    old = kept("quickstart-0.json")
    recipe = Recipe.from_dict(old)
    assert recipe == Recipe.from_dict(
        {
            "preset": "quickstart",
            "seed": 2,
            "pruning": {"ratio": 0.3},
            "space": {"candidates": [4, 8], "granularity": "sublayer"},
            "training": {"steps": 6},
        }
    )
    assert Recipe.from_dict({**old, "model": "some/model"}).model == "some/model"
    assert recipe.evaluation == PRESETS["quickstart"].evaluation


def test_a_newer_format_is_refused_in_one_line(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=url, study_name="s")
    study.set_user_attr(RECIPE_ATTR, {**Recipe().to_dict(), "format": FORMAT + 1, "novelty": 1})
    says = rf"reads recipes up to format {FORMAT}, got {FORMAT + 1}; upgrade it\.$"
    with pytest.raises(ValueError, match=says):
        Recipe.from_dict({"format": FORMAT + 1})
    with pytest.raises(ValueError, match=f"the recipe of study 's': .*{says}"):
        stored_recipe(url)
    with pytest.raises(ValueError, match=says):
        search(Recipe(), tmp_path / "out", trials=1, storage=url, study_name="s")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def old_study(model, tokenizer, texts, tmp_path, monkeypatch):
    """A study of format 1, whose recipe names files relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    Path("text.txt").write_text("\n\n".join(texts * 3))
    shutil.copy(DATA / "study-1.db", "study.db")
    return "sqlite:///study.db"


def test_a_study_of_format_1_goes_on_and_is_exported(old_study):
    study, recipe = stored_study(old_study, trust_study=True)
    before = study.user_attrs[RECIPE_ATTR]
    assert "format" not in before
    found = search(recipe, Path("out"), trials=5, storage=old_study, say=lambda line: None)
    assert [trial.state.name for trial in found.study.trials] == ["COMPLETE"] * 5
    assert found.study.user_attrs[RECIPE_ATTR] == before, "workers of both versions may share the study"
    exported = export(
        old_study, None, Path("export"), pruned=Path("out/pruned"), trust_study=True, say=lambda line: None
    )
    assert exported.loss < exported.loss_before
    with pytest.raises(ValueError, match="'search' belongs to other settings: seed was 0, now 1"):
        search(Recipe.from_dict({**before, "seed": 1}), Path("other"), trials=5, storage=old_study)


def test_a_comparison_of_format_1_is_complete(old_study, monkeypatch):
    shutil.copytree(DATA / "compare-1", "c")
    monkeypatch.setattr(compare_module, "_recover_and_measure", lambda *args: pytest.fail("computed again"))
    found = compare(old_study, "search", Path("c"), seeds=2, trust_study=True, say=lambda line: None)
    results = kept("compare-1/results.json")
    for row in found.rows:
        assert row.losses[0] == results[f"{row.method}, seed 1000"]["loss"]
