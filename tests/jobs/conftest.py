"""A search of the tiny model, made once and only read by the tests."""

from __future__ import annotations

import copy

import optuna
import pytest

from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.search import search

TINY = {
    "pruning": {"ratio": 0.2, "multiple_of": 8, "n_samples": 4, "sample_length": 32},
    "space": {"candidates": [2, 4, 8], "budget": "uniform:4"},
    "training": {"steps": 4, "learning_rate": 0.01},
}


@pytest.fixture(autouse=True)
def quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="session")
def tiny(make_model, tokenizer, texts, tmp_path_factory):
    """The settings of a recipe, as TOML would give them, and the folder of its model and text."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("\n\n".join(texts * 3))
    data = {"train": str(folder / "text.txt"), "block_length": 32}
    return {**TINY, "model": str(folder / "dense"), "data": data}, folder


@pytest.fixture
def values(tiny):
    return copy.deepcopy(tiny[0])


@pytest.fixture
def recipe(values):
    return Recipe.from_dict(values)


@pytest.fixture(scope="session")
def searched(tiny):
    """A finished search in a storage of its own."""
    values, folder = tiny
    url = f"sqlite:///{folder / 'study.db'}"
    return search(Recipe.from_dict(values), folder / "out", trials=4, storage=url, say=lambda line: None)
