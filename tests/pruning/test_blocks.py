from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from benchmarks.families.models import tiny_model
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.pruning import profile_of, prune
from rankadaptor_optuna.pruning.blocks import importance_by_whole_model, skipped
from rankadaptor_optuna.pruning.shortened import block_importance

SETTINGS = {"method": "shortened", "n_samples": 2, "sample_length": 16, "keep_first": 0, "keep_last": 0}


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("criterion", ["ppl", "taylor", "magnitude"])
def test_importance_is_the_same_by_whole_models_and_block_by_block(any_model, samples, criterion):
    by_block = block_importance(any_model, samples, [0, 2], criterion=criterion)
    whole = importance_by_whole_model(any_model, samples, [0, 2], criterion, None)
    assert whole == pytest.approx(by_block, rel=1e-4)
    assert not any(p.grad is not None for p in any_model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "deepseek_v3", "bamba", "falcon_h1", "gemma3", "smollm3"])
def test_blocks_of_any_decoder_are_removed(family, tokenizer, texts, ids, tmp_path):
    model = tiny_model(family)
    result = prune(model, tokenizer, ratio=0.25, calibration=texts, **SETTINGS)
    assert type(result.model) is type(model)
    (gone,) = [entry.layer for entry in result.profile if entry.parameters_removed == 1]
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    with torch.no_grad(), skipped(list(blocks), [gone]):
        assert torch.allclose(result.model(ids).logits, model(ids).logits, atol=1e-5)
    result.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert profile_of(loaded) == result.profile


@pytest.mark.filterwarnings("ignore:.*no adapters in")
def test_what_is_left_of_a_model_by_blocks_is_not_damaged(tokenizer, texts):
    result = prune(tiny_model("deepseek_v3"), tokenizer, ratio=0.25, calibration=texts, **SETTINGS)
    space = RankSpace.from_model(result)
    assert space.layers == (0, 1, 2)
    assert space.profile == (0, 0, 0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("diffllama", "its blocks compute by their position or number"),
        ("minicpm3", "its blocks compute by their position or number"),
        ("gemma3n_text", "embed_tokens_per_layer.weight depends on their number or order"),
        ("t5", "is an encoder-decoder model"),
    ],
)
def test_blocks_that_cannot_be_removed_are_refused(family, reason, tokenizer, texts):
    with pytest.raises(ValueError, match=reason):
        prune(tiny_model(family), tokenizer, ratio=0.25, calibration=texts, **SETTINGS)


@pytest.mark.parametrize("method", ["llm-pruner", "shortened"])
def test_other_classes_quantised_and_offloaded_weights_are_refused(model, tokenizer, texts, method):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    classifier = LlamaForSequenceClassification(LlamaConfig(vocab_size=256, num_hidden_layers=4, **sizes))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no language-model head"):
        prune(classifier, tokenizer, calibration=texts, method=method)
    mlp = model.model.layers[2].mlp
    dense = mlp.up_proj.weight
    mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64 * 16, 1, dtype=torch.uint8), False)  # packed
    with pytest.raises(ValueError, match="cannot prune LlamaForCausalLM: its weights are quantised; load the model un"):
        prune(model, tokenizer, calibration=texts, method=method)
    mlp.up_proj.weight = dense
    model.model.layers[3].to("meta")
    with pytest.raises(ValueError, match="LlamaForCausalLM has weights that are offloaded to disk"):
        prune(model, tokenizer, calibration=texts, method=method)


@pytest.mark.parametrize("options", [{}, {"structure": "hidden"}, {"method": "shortened"}])
def test_a_ratio_out_of_reach_is_refused_before_the_calibration(model, tokenizer, texts, options):
    settings = {"calibration": texts, "n_samples": 2, "sample_length": 16, "ratio": 0.97, "progress": pytest.fail}
    with pytest.raises(ValueError, match="largest"):
        prune(model, tokenizer, **settings, **options)
