from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning.taylor import draw_samples, taylor_importance


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


def test_importance_is_the_sum_of_weight_times_gradient_over_the_coupled_group(any_model, samples):
    """Every |w * g| of the formula, added up entry by entry with no help from the code under test."""
    importance = taylor_importance(any_model, samples, [1, 2])
    any_model.zero_grad()
    any_model(input_ids=samples, labels=samples).loss.backward()

    for index in (1, 2):
        layer = any_model.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        hd, groups = attention.head_dim, attention.num_key_value_groups
        score = {name: (p * p.grad).abs().detach() for name, p in layer.named_parameters()}
        for head in range(2):
            expected = 0.0
            query_rows = range(head * groups * hd, (head + 1) * groups * hd)
            key_rows = range(head * hd, (head + 1) * hd)
            for name, rows in (("q", query_rows), ("k", key_rows), ("v", key_rows)):
                for row in rows:
                    expected += score[f"self_attn.{name}_proj.weight"][row].sum()
                    if getattr(attention, f"{name}_proj").bias is not None:
                        expected += score[f"self_attn.{name}_proj.bias"][row]
            for column in query_rows:
                expected += score["self_attn.o_proj.weight"][:, column].sum()
            torch.testing.assert_close(importance["heads"][index][head], expected, rtol=1e-4, atol=1e-6)
        for channel in range(64):
            expected = score["mlp.down_proj.weight"][:, channel].sum()
            for name in ("gate", "up"):
                expected = expected + score[f"mlp.{name}_proj.weight"][channel].sum()
                if getattr(mlp, f"{name}_proj").bias is not None:
                    expected = expected + score[f"mlp.{name}_proj.bias"][channel]
            torch.testing.assert_close(importance["channels"][index][channel], expected, rtol=1e-4, atol=1e-6)


def test_scoring_leaves_gradients_and_flags_as_they_were(model, samples):
    model.train()
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 7.0)
    taylor_importance(model, samples, [1])
    assert model.training
    assert not model.model.norm.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.layers.1.mlp.up_proj.weight"]
    assert (weight.grad == 7.0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scoring_works_where_the_caller_turned_gradients_off(model, samples, mode):
    expected = taylor_importance(model, samples, [1])["channels"][1]
    with mode():
        found = taylor_importance(model, samples, [1])["channels"][1]
    assert torch.equal(found, expected)


def test_scoring_leaves_the_model_as_it_was_even_when_it_fails(model, samples):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taylor_importance(model, samples, [1], progress=fail)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.sum().backward()
    assert weight.grad is not None  # no hook is left to take it away


def test_progress_counts_samples(model, samples):
    seen = []
    taylor_importance(model, samples, [1], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_low_precision_models_are_scored_in_float32(model, samples):
    exact = taylor_importance(model, samples, [1])["channels"][1]
    rough = taylor_importance(model.bfloat16(), samples, [1])["channels"][1]
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.99


def test_gradients_that_are_not_finite_are_refused(model, samples):
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*bfloat16"):
        taylor_importance(model, samples, [1])


def test_token_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match=r"token id 300.*256 tokens"):
        taylor_importance(model, torch.full((1, 4), 300), [1])


def test_samples_are_distinct_windows_of_the_texts_and_depend_on_the_seed(tokenizer, texts):
    def draw(seed):
        return draw_samples(tokenizer, texts, n_samples=5, sample_length=20, seed=seed)

    joined = "".join(texts)
    windows = [tokenizer.decode(row) for row in draw(0)]
    assert draw(0).shape == (5, 20)
    assert len(set(windows)) == 5
    assert all(window in joined for window in windows)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(ValueError, match=r"holds 10 tokens, too few for 2 samples of 8"):
        draw_samples(tokenizer, ["hello", "world"], n_samples=2, sample_length=8, seed=0)


@pytest.mark.parametrize(("n_samples", "sample_length"), [(0, 8), (1, 1)])
def test_sample_settings_out_of_range_are_refused(tokenizer, n_samples, sample_length):
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        draw_samples(tokenizer, ["hello"], n_samples=n_samples, sample_length=sample_length, seed=0)


@pytest.mark.parametrize("texts", ["one string", [1, 2]])
def test_calibration_that_is_no_list_of_texts_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match="list of texts"):
        draw_samples(tokenizer, texts, n_samples=1, sample_length=4, seed=0)
