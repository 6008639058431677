from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning.importance import unit_importance


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


def gradients_of(model, samples):
    """By name: the mean of the samples' gradients and the mean of their squares, from ordinary backward passes."""
    each = []
    for sample in samples:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        each.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    means = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    squares = {name: torch.stack([g[name] ** 2 for g in each]).mean(0) for name in each[0]}
    return means, squares


def formula(criterion, w, g, g2):
    return {
        "param_first": (w * g).abs(),
        "param_second": (w**2 * g2).abs(),
        "param_mix": (w * g - 0.5 * w**2 * g2).abs(),
        "l1": w.abs(),
        "l2": w**2,
    }[criterion].detach()


def expected_importance(layer, prefix, score):
    """Importance of (heads, channels), added up entry by entry without the code under test."""
    attention, mlp = layer.self_attn, layer.mlp
    width, groups = attention.head_dim, attention.num_key_value_groups
    heads, channels = torch.zeros(2), torch.zeros(64)
    for head in range(2):
        queries = range(head * groups * width, (head + 1) * groups * width)
        keys = range(head * width, (head + 1) * width)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            heads[head] += sum(score[f"{prefix}.self_attn.{name}_proj.weight"][row].sum() for row in rows)
            if getattr(attention, f"{name}_proj").bias is not None:
                heads[head] += sum(score[f"{prefix}.self_attn.{name}_proj.bias"][row] for row in rows)
        heads[head] += sum(score[f"{prefix}.self_attn.o_proj.weight"][:, column].sum() for column in queries)
    for channel in range(64):
        channels[channel] = score[f"{prefix}.mlp.down_proj.weight"][:, channel].sum()
        for name in ("gate", "up"):
            channels[channel] += score[f"{prefix}.mlp.{name}_proj.weight"][channel].sum()
            if getattr(mlp, f"{name}_proj").bias is not None:
                channels[channel] += score[f"{prefix}.mlp.{name}_proj.bias"][channel]
    return heads, channels


def test_importance_is_the_formula_summed_over_the_coupled_group(any_model, samples):
    means, squares = gradients_of(any_model, samples)
    for criterion in ("param_first", "param_second", "param_mix", "l1", "l2"):
        importance = unit_importance(any_model, samples, [2], criterion=criterion)
        parameters = any_model.named_parameters()
        score = {name: formula(criterion, p, means[name], squares[name]) for name, p in parameters}
        heads, channels = expected_importance(any_model.model.layers[2], "model.layers.2", score)
        torch.testing.assert_close(importance["heads"][2], heads, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(importance["channels"][2], channels, rtol=1e-4, atol=1e-6)


def test_reductions_combine_the_projections_of_a_unit(model, samples):
    mlp = model.model.layers[1].mlp
    parts = torch.stack(
        [mlp.gate_proj.weight.abs().sum(1), mlp.up_proj.weight.abs().sum(1), mlp.down_proj.weight.abs().sum(0)]
    )
    expected = {
        "sum": parts.sum(0),
        "mean": parts.mean(0),
        "max": parts.max(0).values,
        "prod": parts.prod(0),
        "first": parts[0],
    }
    for reduction, values in expected.items():
        found = unit_importance(model, samples, [1], criterion="l1", reduction=reduction)
        torch.testing.assert_close(found["channels"][1], values.detach(), rtol=1e-5, atol=0)
    keys = model.model.layers[1].self_attn.k_proj.weight.abs().view(2, -1).sum(1).detach()
    first = unit_importance(model, samples, [1], criterion="l1", reduction="first")
    torch.testing.assert_close(first["heads"][1], keys)


def test_random_importance_depends_on_the_seed_alone(model, samples):
    first, again, other = (
        unit_importance(model, samples, [1, 2], criterion="random", seed=seed)["channels"] for seed in (0, 0, 1)
    )
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[1], other[1])


def test_scoring_leaves_gradients_and_flags_as_they_were(model, samples):
    model.train()
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 7.0)
    unit_importance(model, samples, [1])
    assert model.training
    assert not model.model.norm.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.layers.1.mlp.up_proj.weight"]
    assert (weight.grad == 7.0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scoring_works_where_the_caller_turned_gradients_off(model, samples, mode):
    expected = unit_importance(model, samples, [1])["channels"][1]
    with mode():
        found = unit_importance(model, samples, [1])["channels"][1]
    assert torch.equal(found, expected)


def test_scoring_leaves_the_model_as_it_was_even_when_it_fails(model, samples):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unit_importance(model, samples, [1], progress=fail)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.sum().backward()
    assert weight.grad is not None  # no hook is left to take it away


def test_progress_counts_the_blocks_of_the_backward_pass(model, samples):
    seen = []
    unit_importance(model, samples, [2], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_low_precision_models_are_scored_in_float32(model, samples):
    exact = unit_importance(model, samples, [1])["channels"][1]
    rough = unit_importance(model.bfloat16(), samples, [1])["channels"][1]
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.99


def test_gradients_that_are_not_finite_are_refused(model, samples):
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*bfloat16"):
        unit_importance(model, samples, [1])
