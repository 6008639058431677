from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rankadaptor_optuna.llm.texts import load_texts
from rankadaptor_optuna.pruning import LayerProfile, PrunedModel, PruningConfig, llm_pruner_preset, prune
from rankadaptor_optuna.pruning.importance import unit_importance
from rankadaptor_optuna.pruning.methods import silenced

DROPPED = {"heads": {1: [0], 2: [1]}, "channels": {1: [*range(24)], 2: [*range(3, 64, 2)]}}


@pytest.fixture
def chosen_units(monkeypatch):
    """The units of DROPPED are the least important, and all others equally so."""

    def score(model, samples, layers, **settings):
        importance = {
            "heads": {layer: torch.ones(2) for layer in layers},
            "channels": {layer: torch.ones(64) for layer in layers},
        }
        for kind, by_layer in DROPPED.items():
            for layer, units in by_layer.items():
                importance[kind][layer][units] = 0.0
        return importance

    monkeypatch.setattr("rankadaptor_optuna.pruning.methods.unit_importance", score)


def block_parameters(model):
    return sum(p.numel() for p in model.model.layers.parameters())


def test_pruned_model_computes_the_dense_one_without_the_outputs_of_the_removed_units(
    any_model, tokenizer, settings, ids, chosen_units
):
    """Cutting a unit is the same as zeroing its columns of o and down, for grouped-query heads too."""
    dropped_channels = sum(len(units) for units in DROPPED["channels"].values())
    first = any_model.model.layers[1]
    head = sum(p.numel() for name, p in first.self_attn.named_parameters() if "norm" not in name)
    head = (head - (0 if first.self_attn.o_proj.bias is None else 32)) // 2
    channel = 3 * 32 + (0 if first.mlp.up_proj.bias is None else 2)
    gone = 2 * head + dropped_channels * channel
    settings["multiple_of"] = 1
    result = prune(any_model, tokenizer, ratio=gone / block_parameters(any_model), **settings)
    assert block_parameters(any_model) - block_parameters(result.model) == gone

    with torch.no_grad():
        for index, (unit,) in DROPPED["heads"].items():
            attention = any_model.model.layers[index].self_attn
            width = attention.num_key_value_groups * attention.head_dim
            attention.o_proj.weight[:, unit * width : (unit + 1) * width] = 0
        for index, units in DROPPED["channels"].items():
            any_model.model.layers[index].mlp.down_proj.weight[:, units] = 0
        expected, found = any_model(ids).logits, result.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "ratio"), [("llama", 0.05), ("llama-biased", 0.1), ("mistral", 0.2), ("qwen2", 0.3), ("qwen3", 0.35)]
)
def test_the_ratio_asked_for_is_the_share_of_all_block_parameters_removed(
    make_model, tokenizer, settings, family, ratio
):
    model = make_model(family)
    settings["multiple_of"] = 1
    result = prune(model, tokenizer, ratio=ratio, **settings)
    assert result.parameters_removed == pytest.approx(ratio, abs=0.005)
    assert result.parameters_removed == pytest.approx(1 - block_parameters(result.model) / block_parameters(model))


def test_profile_says_what_each_layer_lost(model, tokenizer, settings):
    result = prune(model, tokenizer, ratio=0.3, **settings)
    assert [entry.layer for entry in result.profile] == [0, 1, 2, 3]
    for entry, before, after in zip(result.profile, model.model.layers, result.model.model.layers, strict=True):
        left = sum(p.numel() for p in after.parameters()) / sum(p.numel() for p in before.parameters())
        heads_left = after.self_attn.k_proj.out_features / before.self_attn.k_proj.out_features
        assert entry.parameters_removed == pytest.approx(1 - left)
        assert entry.heads_removed == 1 - heads_left
        assert entry.channels_removed == 1 - after.mlp.down_proj.in_features / 64
        assert 0 <= entry.importance_removed <= entry.parameters_removed
    assert result.profile[0] == LayerProfile(0, 0.0, 0.0, 0.0, 0.0)
    assert result.profile[3] == LayerProfile(3, 0.0, 0.0, 0.0, 0.0)
    assert result.profile[1].importance_removed > 0


@pytest.mark.parametrize("tied", [False, True])
def test_total_share_counts_tied_embeddings_once(make_model, tokenizer, settings, tied):
    model = make_model(tie_word_embeddings=tied)
    result = prune(model, tokenizer, ratio=0.2, **settings)
    blocks = block_parameters(model)
    total = blocks + 256 * 32 * (1 if tied else 2) + 32
    assert result.total_parameters_removed == pytest.approx(result.parameters_removed * blocks / total)
    assert (result.model.lm_head.weight is result.model.model.embed_tokens.weight) == tied


def test_widths_stay_multiples_and_heads_keep_their_groups(any_model, tokenizer, settings):
    pruned = prune(any_model, tokenizer, ratio=0.3, **settings).model
    for dense, layer in zip(any_model.model.layers, pruned.model.layers, strict=True):
        assert layer.mlp.gate_proj.out_features % 8 == 0
        assert layer.self_attn.num_key_value_groups == dense.self_attn.num_key_value_groups
        assert layer.self_attn.head_dim == dense.self_attn.head_dim
        assert layer.self_attn.q_proj.out_features == 2 * layer.self_attn.k_proj.out_features


def test_the_model_passed_in_is_untouched_even_by_training_the_result(model, tokenizer, settings, ids):
    before = model(ids).logits
    pruned = prune(model, tokenizer, ratio=0.2, **settings).model
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(ids).logits, before)
    assert model.config.model_type == "llama"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_same_seed_same_result(model, tokenizer, settings):
    first, again = (prune(model, tokenizer, ratio=0.3, seed=3, **settings) for _ in range(2))
    other = prune(model, tokenizer, ratio=0.3, seed=4, **settings)
    assert first.profile == again.profile
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert first.profile != other.profile


def test_result_trains_even_when_pruned_in_inference_mode(model, tokenizer, settings, ids):
    with torch.inference_mode():
        pruned = prune(model, tokenizer, ratio=0.2, **settings).model
    pruned(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_default_settings_suit_a_model_narrower_than_multiple_of(make_model, tokenizer, settings):
    del settings["multiple_of"]
    result = prune(make_model(intermediate_size=16), tokenizer, ratio=0.2, **settings)
    assert {layer.mlp.up_proj.out_features for layer in result.model.model.layers} <= {16, 8}
    assert result.parameters_removed > 0


def test_keep_first_and_keep_last_say_which_layers_stay_whole(model, tokenizer, settings):
    result = prune(model, tokenizer, ratio=0.15, keep_first=0, keep_last=3, **settings)
    assert [entry.parameters_removed > 0 for entry in result.profile] == [True, False, False, False]


def test_arguments_that_do_not_fit_the_model_are_refused(model, tokenizer, settings):
    with pytest.raises(ValueError, match=r"largest possible ratio is 0\.\d+"):
        prune(model, tokenizer, ratio=0.9, **settings)
    with pytest.raises(ValueError, match="4 layers the first 2 and the last 2 are kept"):
        prune(model, tokenizer, keep_first=2, keep_last=2, **settings)
    with pytest.raises(ValueError, match=r"there is no file no/such/file\.txt"):
        prune(model, tokenizer, **(settings | {"calibration": "no/such/file.txt"}))


def test_a_config_and_keywords_say_the_same(model, tokenizer, settings):
    calibration = settings.pop("calibration")
    config = PruningConfig(method="shortened", ratio=0.5, **settings)
    found = prune(model, tokenizer, config, calibration=calibration, ratio=0.25)
    assert (
        found.profile
        == prune(model, tokenizer, method="shortened", ratio=0.25, calibration=calibration, **settings).profile
    )
    with pytest.raises(ValueError, match="unknown pruning option 'ratios'; known options: method, ratio, criterion"):
        prune(model, tokenizer, ratios=0.25)


def test_a_model_of_two_layers_cannot_be_pruned(make_model, tokenizer, settings):
    with pytest.raises(ValueError, match="nothing to prune: of the model's 2 layers"):
        prune(make_model(num_hidden_layers=2), tokenizer, **settings)


def test_a_pruned_model_is_not_pruned_again(model, tokenizer, settings):
    pruned = prune(model, tokenizer, ratio=0.1, **settings).model
    with pytest.raises(ValueError, match="pruned already"):
        prune(pruned, tokenizer, ratio=0.1, **settings)


def test_a_model_with_other_modules_is_refused_naming_what_is_missing(tokenizer, settings):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
    message = r"looked for model\.layers\[i\]\.self_attn\.\{q,k,v,o\}_proj .* but model\.layers is missing"
    with pytest.raises(ValueError, match=message):
        prune(model, tokenizer, **settings)


def test_a_projection_that_is_no_plain_linear_is_refused(model, tokenizer, settings):
    model.model.layers[2].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"model\.layers\[2\]\.mlp\.up_proj is a Identity"):
        prune(model, tokenizer, **settings)
    del model.model.layers[2].mlp.up_proj
    with pytest.raises(ValueError, match=r"model\.layers\[2\]\.mlp\.up_proj is missing"):
        prune(model, tokenizer, **settings)


def test_a_family_without_a_pruned_class_is_refused(model, tokenizer, settings):
    type(model.config).model_type, kept = "other", type(model.config).model_type
    try:
        with pytest.raises(ValueError, match="type 'other'; known types: llama, mistral, qwen2, qwen3"):
            prune(model, tokenizer, **settings)
    finally:
        type(model.config).model_type = kept


def test_importing_the_package_is_cheap():
    code = (
        "import sys, rankadaptor_optuna.pruning as p; p.PruningConfig(); "
        "assert not {'torch', 'transformers'} & set(sys.modules); assert 'prune' in dir(p)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_of_the_package_raise_attribute_error():
    import rankadaptor_optuna.pruning as package

    assert package.PrunedModel is PrunedModel
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_the_preset_takes_a_quarter_of_each_layer_but_the_first_4_and_last_2_of_32(make_model, tokenizer, texts):
    shape = {"num_hidden_layers": 32, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = make_model(**shape, intermediate_size=64)
    result = prune(model, tokenizer, calibration=texts, multiple_of=16, **llm_pruner_preset(32))
    assert result.parameters_removed == pytest.approx(0.25 * 26 / 32, abs=0.002)
    for entry in result.profile:
        lost = (0.25, 0.25) if 4 <= entry.layer <= 29 else (0.0, 0.0)
        assert (entry.heads_removed, entry.channels_removed) == lost


def test_each_step_measures_what_is_left_and_keeps_what_went(model, tokenizer, settings, monkeypatch):
    gone = []

    def watch(model, samples, layers, **options):
        found = unit_importance(model, samples, layers, **options)
        gone.append(
            {(layer, i) for layer, v in found["channels"].items() for i in (v == 0).nonzero().flatten().tolist()}
        )
        return found

    monkeypatch.setattr("rankadaptor_optuna.pruning.methods.unit_importance", watch)
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    calls = []
    result = prune(model, tokenizer, ratio=0.3, steps=3, progress=lambda *call: calls.append(call), **settings)
    assert not gone[0]
    assert gone[0] < gone[1] < gone[2]
    assert calls[-1][0] == calls[-1][1]
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)
    monkeypatch.undo()
    one_step = prune(model, tokenizer, ratio=0.3, **settings)
    assert result.parameters_removed == pytest.approx(one_step.parameters_removed, abs=0.02)
    assert result.profile != one_step.profile


def test_silenced_units_compute_as_if_they_were_gone(any_model, tokenizer, settings, ids):
    result = prune(any_model, tokenizer, ratio=0.3, **settings)
    kept = {"heads": {}, "channels": {}}
    for index, (dense, pruned) in enumerate(zip(any_model.model.layers, result.model.model.layers, strict=True)):
        channels = (dense.mlp.up_proj.weight[:, None] == pruned.mlp.up_proj.weight[None]).all(2).any(1)
        keys = (dense.self_attn.k_proj.weight[:, None] == pruned.self_attn.k_proj.weight[None]).all(2).any(1)
        kept["channels"][index] = channels.nonzero().flatten().tolist()
        kept["heads"][index] = keys.view(2, -1).all(1).nonzero().flatten().tolist()
    before = any_model(ids).logits
    with silenced(any_model, kept):
        torch.testing.assert_close(any_model(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(any_model(ids).logits, before)


def test_calibration_may_be_a_file_and_is_the_embedded_text_by_default(model, tokenizer, settings, texts, tmp_path):
    (tmp_path / "text.txt").write_text("".join(texts))
    from_file = prune(model, tokenizer, ratio=0.2, **(settings | {"calibration": tmp_path / "text.txt"}))
    assert from_file.profile == prune(model, tokenizer, ratio=0.2, **settings).profile
    embedded = prune(model, tokenizer, ratio=0.2, **(settings | {"calibration": load_texts().train}))
    assert prune(model, tokenizer, ratio=0.2, **(settings | {"calibration": None})).profile == embedded.profile


def test_samples_longer_than_the_table_of_positions_are_refused(tokenizer, texts):
    short = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=32, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match="sample_length=32 exceeds the 16 positions"):
        prune(short, tokenizer, method="shortened", calibration=texts, sample_length=32)


@pytest.mark.parametrize("options", [{"ratio": "0.2"}, {"seed": "0"}, {"n_samples": 4.0}, {"keep_first": True}])
def test_an_option_of_another_type_is_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an? "):
        PruningConfig(**options)
