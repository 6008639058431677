from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest

from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.surrogate.network import Network

SPACE = RankSpace(10, budget="uniform:8")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.update([[8.0] * 9], [1.0]), "expected 10 ranks a configuration, got 9"),
        (lambda m: m.predict([8.0] * 11), "expected 10 ranks a configuration, got 11"),
        (lambda m: m.update([[8.0] * 10], [1.0, 2.0]), "expected 1 finite scores"),
        (lambda m: m.update([[8.0] * 10], [float("nan")]), r"expected 1 finite scores, got \[nan\]"),
        (lambda m: m.update([[8.0] * 10], [1.0], variance=-1.0), "finite and not negative, got -1.0"),
        (lambda m: m.update([[8.0] * 10], [1.0], variance=float("inf")), "finite and not negative, got inf"),
        (lambda m: PerformanceModel(SPACE, direction="up"), '"maximize" or "minimize", got \'up\''),
        (lambda m: PerformanceModel(SPACE, prior="no/such/file"), "cannot read the prior 'no/such/file'"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(PerformanceModel(SPACE, prior=None))


def test_help_shows_the_arguments():
    assert list(inspect.signature(PerformanceModel).parameters)[:2] == ["space", "prior"]


def test_attributes_of_one_mode_are_available_in_that_mode_alone():
    assert PerformanceModel(SPACE).sample(np.random.default_rng(0)).table.shape == (10, 6)
    paper = PerformanceModel(SPACE, mode="paper")
    assert (paper.mode, paper.features.shape) == ("paper", (0, 10))
    with pytest.raises(AttributeError, match="'PaperModel' object has no attribute 'sample'"):
        paper.sample  # noqa: B018


@pytest.mark.parametrize("mode", ["bayesian", "paper"])
def test_a_model_survives_pickling(mode):
    model = PerformanceModel(SPACE, mode=mode)
    model.update([[2.0] * 10, [8.0] * 10, [12.0] * 10], [1.0, 2.0, 4.0])
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict([8.0] * 10), model.predict([8.0] * 10))


@pytest.mark.parametrize("mode", ["other", "", None, "Paper"])
def test_an_unknown_mode_is_named(mode):
    with pytest.raises(ValueError, match=f'mode must be "bayesian" or "paper", got {mode!r}'):
        PerformanceModel(SPACE, mode=mode)


def test_the_papers_network_is_no_prior_of_the_default_mode():
    with pytest.raises(ValueError, match="mode 'bayesian' starts from a Prior or the path of one, got Network"):
        PerformanceModel(SPACE, prior=Network(10))
