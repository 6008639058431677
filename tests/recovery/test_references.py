from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rankadaptor_optuna.ranks import LoraSettings
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, detached, lora_config
from rankadaptor_optuna.recovery.references import (
    _eva_components,
    adalora,
    adapter_parameters,
    eva,
    fisher_information,
    proportional_ranks,
)
from rankadaptor_optuna.recovery.train import TrainingConfig

CONFIG = TrainingConfig(steps=16, batch_size=2, learning_rate=0.02)
SHORT = TrainingConfig(steps=4, batch_size=2, learning_rate=0.02)
COST = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)  # parameters per rank of all modules of a layer


@pytest.fixture
def data(blocks):
    return Examples.of_blocks(blocks)


def ranks_in_use(adapted):
    found = []
    for module in adapted.modules():
        if getattr(module, "lora_E", None):
            found.append(int((module.lora_E["default"] != 0).sum()))
        elif getattr(module, "lora_A", None):
            found.append(module.r["default"])
    return found


@pytest.mark.parametrize("method", [adalora, eva])
def test_it_recovers_by_ranks_of_its_own_and_leaves_the_model_as_it_was(model, data, blocks, method):
    before = block_losses(model, blocks)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with method(model, data, CONFIG, parameters=16 * COST, seed=0) as adapted:
        assert block_losses(adapted, blocks).mean() < before.mean() - 0.5
        ranks = ranks_in_use(adapted)
    assert 100 < sum(ranks) < 150
    assert len(set(ranks)) > 1
    assert {name for name, _ in model.named_parameters()} == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (block_losses(model, blocks) == before).all()


@pytest.mark.parametrize("method", [adalora, eva])
def test_the_same_seed_gives_the_same_recovery(model, data, blocks, method):
    losses = []
    for seed in (0, 0, 1):
        with method(model, data, SHORT, parameters=16 * COST, seed=seed) as adapted:
            losses.append(block_losses(adapted, blocks).mean())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", [adalora, eva])
@pytest.mark.parametrize("parameters", [9_000, 13_337, 30_000])
def test_it_uses_the_parameters_given_to_within_one_rank_of_one_module(model, data, method, parameters):
    model.model.layers[1].mlp.gate_proj = torch.nn.Linear(32, 40, bias=False)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    with method(model, data, SHORT, parameters=parameters, seed=0) as adapted:
        assert parameters - 96 < adapter_parameters(adapted) <= parameters


def test_eva_starts_from_the_principal_components_of_each_modules_inputs(model, data):
    ids = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 64, 52, 33)]
    data, inputs = Examples(ids, ids), []
    module = model.model.layers[2].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].detach()))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    hook.remove()
    config = LoraConfig(r=4, target_modules=["down_proj", "q_proj", "k_proj"], init_lora_weights="eva")
    with detached(model):
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        found = _eva_components(adapted, data.batch([0, 1, 2, 3]), rank=4, parameters=4 * 12 * 80)
    found = {name.split("layers.")[1]: components for name, components in found.items()}
    x = torch.cat(inputs)
    exact = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    ours = found["2.mlp.down_proj"]
    assert 0 < len(ours) <= 8
    assert (exact[: len(ours)] @ ours.T).diagonal().abs().min() > 0.9
    assert torch.equal(*(found[f"1.self_attn.{n}_proj"][:1] for n in "qk"))  # their input is the same


@pytest.mark.parametrize(("alpha", "scaling"), [(None, lambda rank: 2.0), (6, lambda rank: 6 / rank)])
def test_eva_scales_by_the_same_policy_of_alpha(model, data, alpha, scaling):
    with eva(model, data, SHORT, parameters=16 * COST, seed=0, lora=LoraSettings(alpha=alpha)) as adapted:
        found = {(m.r["default"], m.scaling["default"]) for m in adapted.modules() if getattr(m, "lora_A", None)}
    assert len(found) > 1
    assert all(value == pytest.approx(scaling(rank)) for rank, value in found)


def test_parameters_in_use_are_rank_times_in_plus_out(model, data):
    with attached(model, lora_config({0: 2, 3: 8}), seed=0) as adapted:
        assert adapter_parameters(adapted) == 10 * COST
        assert adapter_parameters(adapted) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    with adalora(model, data, CONFIG, parameters=1024, seed=0, lora=LoraSettings(("q_proj",))) as adapted:
        assert adapter_parameters(adapted) == sum(ranks_in_use(adapted)) * 64 == 4 * 4 * 64
    assert adapter_parameters(model) == 0


def test_adalora_needs_steps_for_its_phases(model, data):
    with (
        pytest.raises(ValueError, match="at least 4 training steps, got 3"),
        adalora(model, data, TrainingConfig(steps=3), parameters=999, seed=0),
    ):
        pass


def test_fisher_information_is_the_mean_of_the_squared_gradients_of_each_example(any_model, data):
    any_model.train()
    found = fisher_information(any_model, data, n_examples=3)
    assert any_model.training
    assert all(p.requires_grad and p.grad is None for p in any_model.parameters())
    any_model.eval()
    expected = dict.fromkeys(range(4), 0.0)
    for ids in data.ids[:3]:
        any_model.zero_grad()
        any_model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for name, parameter in any_model.named_parameters():
            if "proj.weight" in name:
                expected[int(name.split(".")[2])] += float(parameter.grad.square().sum()) / 3
    assert found == pytest.approx(expected, rel=1e-4)


def test_ranks_follow_the_shares_and_use_the_budget():
    shares, costs = {0: 1.0, 1: 2.0, 2: 4.0, 3: 1.0}, dict.fromkeys(range(4), 10)
    assert proportional_ranks(shares, costs, range(1, 65), 8 * 4 * 10) == {0: 4, 1: 8, 2: 16, 3: 4}
    found = proportional_ranks(shares, costs, (2, 4, 6, 8, 10, 12), 8 * 4 * 10)
    assert found[2] >= found[1] >= max(found[0], found[3])
    assert sum(10 * rank for rank in found.values()) == 320


def test_where_no_scale_fits_the_smallest_candidates_are_taken():
    assert proportional_ranks({0: 1.0, 1: 1.0}, {0: 10, 1: 10}, (2, 4), 5) == {0: 2, 1: 2}
    assert proportional_ranks({0: 0.0, 1: 1.0}, {0: 10, 1: 10}, (0, 4), 45) == {0: 0, 1: 4}
