from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning import load_pruned, prune
from rankadaptor_optuna.pruning.hidden import hidden_importance, select_hidden


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


def along_hidden(name, tensor):
    """Entries of a parameter with the hidden channels first; None if it has none."""
    if tensor.ndim == 1:
        return None if any(part in name for part in ("q_", "k_", "v_", "gate", "up_")) else tensor
    return tensor if "o_proj" in name or "down_proj" in name else tensor.T


@pytest.mark.parametrize("family", ["llama-biased", "mistral", "qwen2", "qwen3"])
def test_importance_is_the_formula_summed_over_everything_coupled(make_model, family, samples):
    model = make_model(family, tie_word_embeddings=False)
    criteria = ("param_first", "param_second", "l1")
    found = {criterion: hidden_importance(model, samples, criterion=criterion) for criterion in criteria}
    each = []
    for sample in samples:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        each.append({name: p.grad.clone() for name, p in model.named_parameters()})
    expected = {criterion: torch.zeros(32) for criterion in criteria}
    for name, w in model.named_parameters():
        grads = torch.stack([g[name] for g in each])
        score = {"param_first": (w * grads.mean(0)).abs(), "param_second": w**2 * grads.square().mean(0), "l1": w.abs()}
        for criterion in criteria:
            entries = along_hidden(name, score[criterion].detach())
            if entries is not None:
                expected[criterion] += entries.reshape(32, -1).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "ratio"), [("llama", 0.2), ("llama-biased", 0.3), ("mistral", 0.5), ("qwen2", 0.2), ("qwen3", 0.3)]
)
def test_the_hidden_size_shrinks_everywhere_and_the_ratio_is_met(
    make_model, tokenizer, settings, ids, family, ratio, tmp_path
):
    model = make_model(family)
    result = prune(model, tokenizer, structure="hidden", ratio=ratio, **settings)
    width = result.model.config.hidden_size
    assert width < 32
    assert result.model.model.embed_tokens.weight.shape[1] == width
    assert result.model.lm_head.weight.shape[1] == width
    assert result.parameters_removed == pytest.approx(ratio, abs=2 / 32)
    assert type(result.model) is type(model)
    assert [entry.parameters_removed for entry in result.profile] == [pytest.approx(result.parameters_removed)] * 4
    assert result.model(ids).logits.isfinite().all()
    result.save(tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(ids).logits, result.model(ids).logits)
    result.model(input_ids=ids, labels=ids).loss.backward()


def test_the_least_important_go_and_widths_are_multiples_as_far_as_the_ratio_allows():
    importance = torch.arange(100.0).flip(0)
    assert select_hidden(importance, ratio=0.2, share=1.0, heads=4, multiple_of=32) == list(range(80))
    assert len(select_hidden(torch.rand(4096), ratio=0.2, share=1.0, heads=8, multiple_of=32)) == 3264
    assert len(select_hidden(torch.rand(576), ratio=0.2, share=1.0, heads=9, multiple_of=32)) == 459


@pytest.mark.parametrize("ratio", [0.001, 0.999])
def test_a_ratio_out_of_reach_names_those_possible(ratio):
    with pytest.raises(ValueError, match=r"smallest possible ratio is 0\.0099, the largest 0\.9801"):
        select_hidden(torch.rand(100), ratio=ratio, share=0.99, heads=1, multiple_of=1)
