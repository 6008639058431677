"""A recovery in miniature."""

from __future__ import annotations

import pytest

from rankadaptor_optuna import RankSpace, RecoveryObjective
from tests.objective.common import TRAINING


@pytest.fixture
def make_job(model, texts):
    def make(tokenizer, candidates=(2, 4, 8), budget="uniform:4", **settings):
        space = RankSpace.from_model(model, candidates, budget)
        settings = {"train": texts[:8], "validation": texts[8:], "training": TRAINING, "block_length": 32} | settings
        return RecoveryObjective(model, tokenizer, space, **settings)

    return make


@pytest.fixture
def job(make_job, tokenizer):
    return make_job(tokenizer)
