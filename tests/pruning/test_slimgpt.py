from __future__ import annotations

import copy

import pytest
import torch

from rankadaptor_optuna.pruning import load_pruned, prune
from rankadaptor_optuna.pruning.slimgpt import _Surgeon, layer_ratios, slimgpt

OUTPUTS = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}


@pytest.fixture
def samples():
    return torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def problem():
    """A projection of 24 inputs to 5 outputs, its inputs (tokens, 24), correlated, and their damped Hessian."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs
    return weight, inputs, hessian, hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)


def best_without(weight, damped, gone):
    """The weights of the other columns that come closest to the old output, and the damped squared error left."""
    kept = [i for i in range(weight.shape[1]) if i not in gone]
    found = torch.zeros_like(weight)
    found[:, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
    difference = weight - found
    return found, (difference @ damped * difference).sum()


def test_compensation_is_the_least_squares_solution_over_the_columns_left(problem):
    weight, _, hessian, damped = problem
    surgeon = _Surgeon(weight, hessian, 0.01)
    left = surgeon.remove_units(24, 9, 1)
    gone = sorted(set(range(24)) - set(left))
    assert len(gone) == 9
    torch.testing.assert_close(surgeon.weight, best_without(weight, damped, gone)[0])


@pytest.mark.parametrize("width", [1, 4])
def test_the_error_of_a_unit_is_what_is_left_after_the_others_made_up_for_it(problem, width):
    weight, _, hessian, damped = problem
    errors = _Surgeon(weight, hessian, 0.01).errors(range(24 // width), width)
    for unit, error in enumerate(errors):
        columns = range(unit * width, (unit + 1) * width)
        torch.testing.assert_close(error, best_without(weight, damped, columns)[1])


def test_heads_go_one_by_one_each_the_cheapest_of_those_left(problem):
    weight, _, hessian, damped = problem
    left = _Surgeon(weight, hessian, 0.01).remove_units(6, 3, 4)
    gone = []
    for _ in range(3):
        candidates = [unit for unit in range(6) if unit not in gone]
        columns = {u: [i for g in [*gone, u] for i in range(4 * g, 4 * g + 4)] for u in candidates}
        gone.append(min(candidates, key=lambda u: best_without(weight, damped, columns[u])[1]))
    assert left == sorted(set(range(6)) - set(gone))


def test_compensation_makes_the_output_error_smaller(problem):
    weight, inputs, hessian, _ = problem
    surgeon = _Surgeon(weight, hessian, 0.01)
    left = surgeon.remove_units(24, 6, 1)
    cut = weight.clone()
    cut[:, sorted(set(range(24)) - set(left))] = 0
    error = {name: (inputs @ (w - weight).T).square().sum() for name, w in (("cut", cut), ("made up", surgeon.weight))}
    assert error["made up"] < 0.7 * error["cut"]


def test_later_layers_lose_more_by_the_logarithm_of_the_depth_up_to_four_times():
    ratios = layer_ratios(32)
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(4)
    assert ratios[15] - ratios[7] == pytest.approx(ratios[7] - ratios[3])
    # the paper's 0.0625 to 0.25 is 20% of LLaMA-7B
    assert sum(0.0625 * r for r in ratios) / 32 == pytest.approx(0.2, abs=0.002)


def test_each_layer_sees_the_model_pruned_so_far(model, samples):
    """Pruning layer 2 alone, on a model whose layer 1 is already cut, finds what pruning both in turn does."""
    both = slimgpt(model, samples, [1, 2], ratio=0.2, multiple_of=8)
    dense = copy.deepcopy(model)
    for kind, name in OUTPUTS.items():
        weight = model.model.layers[1].get_parameter(f"{name}.weight")
        units = 2 if kind == "heads" else 64
        columns = torch.arange(weight.shape[1]).view(units, -1)[both.kept[kind][1]].flatten()
        with torch.no_grad():
            weight.zero_()
            weight[:, columns] = both.weights[f"model.layers.1.{name}.weight"]
    again = slimgpt(model, samples, [2], ratio=0.1, multiple_of=8)
    unaware = slimgpt(dense, samples, [2], ratio=0.1, multiple_of=8)
    torch.testing.assert_close(again.importance["heads"][2], both.importance["heads"][2])
    assert not torch.allclose(unaware.importance["heads"][2], both.importance["heads"][2])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was_even_when_it_fails(model, samples, fails):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()

    def progress(done, total):
        if fails and done == 2:
            raise KeyboardInterrupt

    try:
        slimgpt(model, samples, range(4), ratio=0.3, multiple_of=8, progress=progress)
    except KeyboardInterrupt:
        assert fails
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("family", "ratio"), [("llama", 0.1), ("llama-biased", 0.2), ("mistral", 0.3), ("qwen2", 0.5), ("qwen3", 0.3)]
)
def test_the_ratio_is_met_and_the_result_opens_and_trains(
    make_model, tokenizer, settings, ids, family, ratio, tmp_path
):
    settings["multiple_of"] = 1
    result = prune(make_model(family), tokenizer, method="slimgpt", ratio=ratio, **settings)
    assert result.parameters_removed == pytest.approx(ratio, abs=0.005)
    result.save(tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(ids).logits, result.model(ids).logits)
    result.model(input_ids=ids, labels=ids).loss.backward()


def test_a_ratio_out_of_reach_names_the_largest_which_is_then_met(model, tokenizer, settings):
    with pytest.raises(ValueError, match=r"4 prunable layers the largest possible ratio is 0\.(\d+);") as refused:
        prune(model, tokenizer, method="slimgpt", ratio=0.95, **settings)
    largest = float(str(refused.value).split("ratio is ")[1].split(";")[0])
    result = prune(model, tokenizer, method="slimgpt", ratio=largest, **settings)
    assert {layer.mlp.up_proj.out_features for layer in result.model.model.layers} == {8}
    assert result.parameters_removed == pytest.approx(largest, abs=1e-3)


def test_inputs_that_are_not_finite_are_refused(model, samples):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"o_proj in layer 1 are not finite.*bfloat16"):
        slimgpt(model, samples, range(4), ratio=0.3, multiple_of=8)


def test_low_precision_models_give_weights_of_their_dtype(model, samples):
    found = slimgpt(model.bfloat16(), samples, range(4), ratio=0.3, multiple_of=8)
    assert {weight.dtype for weight in found.weights.values()} == {torch.bfloat16}
