from __future__ import annotations

from dataclasses import fields

import pytest

from rankadaptor_optuna.pruning.config import (
    PRUNING_METHODS,
    PruningConfig,
    default_kept,
    llm_pruner_preset,
    option_help,
)
from rankadaptor_optuna.pruning.methods import PLANNERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, f"method 'magic' is unknown; known methods: {', '.join(PRUNING_METHODS)}"),
        ({"ratio": 0.0}, "ratio must lie between 0 and 1, got 0.0: it is the share"),
        ({"ratio": 1.0}, "ratio must lie between 0 and 1, got 1.0"),
        ({"ratio": float("nan")}, "ratio must lie between 0 and 1, got nan"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"keep_last": -1}, "keep_last must be at least 0, got -1"),
        ({"sample_length": 1}, "sample_length must be at least 2, got 1"),
        ({"criterion": "ppl"}, "criterion 'ppl' is unknown to llm-pruner; known: param_first, "),
        ({"method": "shortened", "criterion": "l1"}, "criterion 'l1' is unknown to shortened; known: ppl, "),
        ({"reduction": "median"}, "reduction 'median' is unknown; known: sum, mean, max, prod, first"),
        ({"structure": "depth"}, "structure 'depth' is unknown; known: units, hidden"),
        (
            {"method": "shortened", "ranking": "local"},
            "ranking='local' has no effect with method 'shortened'",
        ),
        ({"method": "slimgpt", "structure": "hidden"}, "structure='hidden' has no effect with method 'slimgpt'"),
        ({"structure": "hidden", "steps": 2}, "steps=2 has no effect with structure 'hidden'; leave it out"),
    ],
)
def test_options_that_no_model_allows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**options)


def test_a_default_said_aloud_is_not_refused():
    assert PruningConfig(method="shortened", ranking="global", steps=1).resolved(8)["criterion"] == "ppl"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"criterion": "param_first", "keep_first": 4, "keep_last": 2, "n_samples": 10, "sample_length": 128}),
        ({"method": "shortened"}, {"criterion": "ppl", "keep_first": 4, "n_samples": 10, "sample_length": 128}),
        ({"method": "slimgpt"}, {"criterion": "obs", "keep_first": 0, "keep_last": 0, "n_samples": 128}),
        ({"structure": "hidden"}, {"structure": "hidden", "keep_first": 0, "keep_last": 0}),
        ({"keep_first": 0, "seed": 3, "steps": 2}, {"keep_first": 0, "keep_last": 2, "seed": 3, "steps": 2}),
    ],
)
def test_defaults_are_the_methods_and_what_is_given_stays(options, expected):
    assert PruningConfig(**options).resolved(32).items() >= expected.items()


def test_every_method_has_a_planner():
    assert PLANNERS.keys() == PRUNING_METHODS.keys()


@pytest.mark.parametrize(("n_layers", "kept"), [(32, (4, 2)), (30, (4, 2)), (40, (5, 2)), (4, (1, 1))])
def test_the_papers_share_of_layers_is_kept_whole(n_layers, kept):
    assert default_kept(n_layers) == kept


def test_the_preset_has_llm_pruners_published_numbers():
    assert llm_pruner_preset(32) == {
        "method": "llm-pruner",
        "ratio": 0.25 * 26 / 32,
        "criterion": "param_first",
        "ranking": "local",
        "keep_first": 4,
        "keep_last": 2,
        "n_samples": 10,
        "sample_length": 64,
    }


def test_every_option_has_its_help():
    assert list(option_help()) == [option.name for option in fields(PruningConfig)]
    assert all(text.endswith(".") for text in option_help().values())
