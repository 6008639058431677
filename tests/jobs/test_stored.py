from __future__ import annotations

import re

import optuna
import pytest

from rankadaptor_optuna import create_study
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.stored import stored_recipe, stored_study


@pytest.fixture
def url(tmp_path):
    """A storage with one study that has a recipe and one that has none."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    create_study(storage=url, study_name="mine", recipe=Recipe(seed=5).to_dict())
    optuna.create_study(storage=url, study_name="plain")
    return url


def test_the_only_study_with_a_recipe_needs_no_name(url):
    study, recipe = stored_study(url)
    assert (study.study_name, recipe) == ("mine", Recipe(seed=5))
    assert stored_recipe(url, "mine") == recipe


def test_several_studies_are_listed(url):
    create_study(storage=url, study_name="yours", recipe=Recipe().to_dict())
    with pytest.raises(ValueError, match="has several studies: mine, yours; name one"):
        stored_study(url)


def test_what_cannot_be_found_is_named_and_no_file_is_made(url, tmp_path):
    with pytest.raises(ValueError, match="'plain' was made without a recipe"):
        stored_study(url, "plain")
    with pytest.raises(ValueError, match=r"study\.db has no study named 'other'"):
        stored_study(url, "other")
    optuna.delete_study(storage=url, study_name="mine")
    with pytest.raises(ValueError, match=r"study\.db has no study with a recipe"):
        stored_study(url)
    with pytest.raises(ValueError, match="there is no file"):
        stored_study(f"sqlite:///{tmp_path / 'typo.db'}")
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"evaluation": {"include_path": "tasks"}}, "evaluation.include_path tasks"),
        ({"model": "/models/llama"}, "model /models/llama"),
        ({"model": "../llama"}, "model ../llama"),
        ({"model": "here"}, "model here"),
        ({"data": {"train": "/etc/passwd"}}, "data.train /etc/passwd"),
        ({"data": {"report": "here:main"}}, "data.report here:main"),
        ({"data": {"validation": "https://host/data"}}, "data.validation https://host/data"),
        ({"pruning": {"calibration": "~/text"}}, "pruning.calibration ~/text"),
    ],
)
def test_local_files_of_a_stored_recipe_need_consent(tmp_path, monkeypatch, settings, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    recipe = Recipe.from_dict(settings)
    create_study(storage="sqlite:///study.db", study_name="s", recipe=recipe.to_dict())
    with pytest.raises(ValueError, match=rf"names local files.*: {re.escape(named)}\. Give --trust-study"):
        stored_study("sqlite:///study.db")
    assert stored_recipe("sqlite:///study.db", trust_study=True) == recipe


def test_models_and_data_sets_of_the_hub_need_no_consent(tmp_path):
    data = {"train": "yahma/alpaca-cleaned", "report": "Salesforce/wikitext:wikitext-2-raw-v1"}
    recipe = Recipe.from_dict({"model": "Qwen/Qwen2.5-0.5B", "data": data, "pruning": {"calibration": "c4"}})
    create_study(storage=f"sqlite:///{tmp_path / 's.db'}", study_name="s", recipe=recipe.to_dict())
    assert stored_recipe(f"sqlite:///{tmp_path / 's.db'}") == recipe
