"""Random small architectures through every pruning method: what comes out works and is what it says it is."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rankadaptor_optuna.pruning import load_pruned, profile_of, prune

pytestmark = pytest.mark.e2e

PRUNING_METHODS = (
    {"method": "llm-pruner"},
    {"method": "llm-pruner", "ranking": "local", "criterion": "param_mix"},
    {"method": "llm-pruner", "structure": "hidden"},
    {"method": "shortened", "criterion": "taylor"},
    {"method": "slimgpt"},
)


def architecture(draw):
    """A family and its settings."""
    family = draw.choice(["llama", "mistral", "qwen2", "qwen3"])
    head_dim, key_heads, group = draw.choice([4, 8, 16]), draw.randint(1, 4), draw.randint(1, 3)
    heads = key_heads * group
    settings = {
        "num_hidden_layers": draw.randint(3, 6),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "hidden_size": heads * draw.choice([4, 8]),
        "head_dim": head_dim,
        "intermediate_size": draw.randint(5, 80),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if family == "llama":
        settings |= {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    return family, settings


def test_any_architecture_comes_out_whole(fuzz_seed, make_model, tokenizer, texts, ids, tmp_path):
    draw = random.Random(fuzz_seed)
    family, settings = architecture(draw)
    dense = make_model(family, **settings)
    done = 0
    for method in PRUNING_METHODS:
        ratio = draw.choice([0.1, 0.2, 0.3, 0.5])
        options = {"multiple_of": draw.choice([1, 4, 32]), "n_samples": 4, "sample_length": 16, **method}
        try:
            result = prune(dense, tokenizer, ratio=ratio, calibration=texts, **options)
        except ValueError as error:
            if "possible ratio" not in str(error):
                raise
            continue  # some architectures cannot lose so much, or so little
        done += 1
        logits = result.model(ids).logits
        assert logits.isfinite().all()
        folder = tmp_path / str(done)
        result.save(folder)
        loaded = load_pruned(folder)
        assert torch.equal(loaded(ids).logits, logits)
        assert profile_of(loaded) == result.profile
        before, after = (sum(p.numel() for p in m.model.layers.parameters()) for m in (dense, loaded))
        assert math.isclose(result.parameters_removed, 1 - after / before, abs_tol=1e-9)
        each = sum(p.numel() for p in dense.model.layers[0].parameters())
        lost = sum(entry.parameters_removed * each for entry in result.profile)
        assert math.isclose(lost, before - after, rel_tol=1e-6, abs_tol=0.5)
    assert done
