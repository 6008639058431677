from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning import load_pruned, profile_of, prune
from rankadaptor_optuna.pruning.shortened import block_importance, select_blocks


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


def test_ppl_importance_is_the_loss_of_the_model_without_the_block(any_model, samples):
    found = block_importance(any_model, samples, [0, 2], criterion="ppl")
    blocks = any_model.model.layers
    for left_out in (0, 2):
        hook = blocks[left_out].register_forward_hook(lambda module, args, output: args[0])
        with torch.no_grad():
            expected = any_model(input_ids=samples, labels=samples).loss
        hook.remove()
        assert found[left_out] == pytest.approx(expected.item(), rel=1e-5)


def test_taylor_and_magnitude_add_up_the_projections(any_model, samples):
    taylor = block_importance(any_model, samples, [1, 3], criterion="taylor")
    magnitude = block_importance(any_model, samples, [1, 3], criterion="magnitude")
    any_model(input_ids=samples, labels=samples).loss.backward()
    for index in (1, 3):
        weights = [p for n, p in any_model.model.layers[index].named_parameters() if "proj.weight" in n]
        assert len(weights) == 7
        assert taylor[index] == pytest.approx(sum((w * w.grad).abs().sum().item() for w in weights), rel=1e-4)
        assert magnitude[index] == pytest.approx(sum(w.abs().sum().item() for w in weights), rel=1e-5)


def test_the_number_of_blocks_is_rounded_to_the_nearest_and_the_least_important_go():
    importance = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}
    assert select_blocks(importance, ratio=0.2, n_layers=6) == [0, 1, 3, 4, 5]
    assert select_blocks(importance, ratio=0.3, n_layers=6) == [0, 1, 3, 5]


@pytest.mark.parametrize("ratio", [0.05, 0.8])
def test_a_ratio_of_no_whole_block_or_too_many_names_those_possible(ratio):
    with pytest.raises(ValueError, match=r"smallest possible ratio is 0\.1667, the largest 0\.6667"):
        select_blocks({1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}, ratio=ratio, n_layers=6)


@pytest.mark.parametrize(
    ("family", "criterion"),
    [("llama", "ppl"), ("llama-biased", "taylor"), ("mistral", "magnitude"), ("qwen2", "random"), ("qwen3", "ppl")],
)
def test_the_result_is_an_ordinary_model_with_fewer_layers(
    make_model, tokenizer, settings, ids, family, criterion, tmp_path
):
    model = make_model(family)
    result = prune(model, tokenizer, method="shortened", criterion=criterion, ratio=0.25, **settings)
    assert type(result.model) is type(model)
    assert len(result.model.model.layers) == result.model.config.num_hidden_layers == 3
    assert result.parameters_removed == pytest.approx(0.25)
    (gone,) = [entry.layer for entry in result.profile if entry.parameters_removed == 1.0]
    assert gone in (1, 2)
    model.model.layers[gone].register_forward_hook(lambda module, args, output: args[0])
    assert torch.equal(result.model(ids).logits, model(ids).logits)
    result.save(tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert profile_of(loaded) == result.profile


def test_blocks_keep_their_kind_of_attention(make_model, tokenizer, settings):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = make_model("qwen2", layer_types=kinds, sliding_window=8, use_sliding_window=True)
    result = prune(model, tokenizer, method="shortened", ratio=0.25, keep_first=0, keep_last=3, **settings)
    assert result.model.config.layer_types == kinds[1:]
    result.model.generate(torch.arange(6)[None], max_new_tokens=4, pad_token_id=0)
