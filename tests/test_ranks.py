from __future__ import annotations

import json

import pytest

from rankadaptor_optuna.ranks import LoraSettings, Ranks


def test_patterns_leave_out_rank_zero():
    assert Ranks({0: 0, 3: 4}).rank_pattern == {r"layers\.3\..*": 4}
    assert Ranks({0: 0, 3: 4}).alpha_pattern(LoraSettings(alpha_ratio=0.5)) == {r"layers\.3\..*": 2.0}


def test_patterns_of_parts_are_escaped():
    ranks = Ranks({"3.self_attn": 2, "3.mlp": 0})
    assert ranks.rank_pattern == {r"layers\.3\.self_attn\..*": 2}
    assert ranks.alpha_pattern(LoraSettings(alpha_ratio=0.5)) == {r"layers\.3\.self_attn\..*": 1.0}


def test_one_alpha_for_all_does_not_follow_the_ranks():
    assert Ranks({0: 2, 1: 8}).alpha_pattern(LoraSettings(alpha=16)) == {r"layers\.0\..*": 16, r"layers\.1\..*": 16}


def test_pefts_one_alpha_is_a_positive_integer():
    assert [LoraSettings(alpha_ratio=0.1).lora_alpha(rank) for rank in (2, 20, 26)] == [1, 2, 3]


@pytest.mark.parametrize("ranks", [Ranks({0: 2, 11: 0}), Ranks({"0.mlp": 2, "11.self_attn": 0})])
def test_a_configuration_survives_json(ranks):
    again = Ranks.from_json(json.loads(json.dumps(ranks.to_json())))
    assert again == ranks
    assert [*again] == [*ranks]


@pytest.mark.parametrize("ranks", [Ranks({0: 2, 1: 0}), Ranks({"0.mlp": 2, "1.mlp": 0})])
def test_the_arguments_of_peft_are_json_and_name_the_modules_without_an_adapter(ranks):
    from peft import LoraConfig

    arguments = json.loads(json.dumps(ranks.lora_arguments(LoraSettings(("q_proj", "up_proj"), dropout=0.1))))
    config = LoraConfig(**arguments)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 4, 0.1)
    assert config.target_modules == {"q_proj", "up_proj"}
    assert config.layers_to_transform == [0] or "0" in config.exclude_modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_ratio": -2}, "alpha_ratio must be positive, got -2"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_settings_are_read_off_a_stored_recipe():
    stored = {"targets": ["q_proj"], "alpha": 16, "of_a_later_version": 1}
    assert LoraSettings.of(stored) == LoraSettings(("q_proj",), alpha=16)
