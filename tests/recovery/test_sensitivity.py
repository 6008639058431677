from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.recovery.data import Examples, token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.sensitivity import SCALE, sensitivities
from rankadaptor_optuna.recovery.train import TrainingConfig, train


@pytest.fixture
def blocks(tokenizer, texts):
    return token_blocks(tokenizer, texts, 32)


@pytest.fixture
def held_out(blocks):
    """Examples of different lengths, of which not every token is a target."""
    labels = [block.clone() for block in blocks[-3:]]
    labels[0][:10] = -100
    return Examples([blocks[-3], blocks[-2][:20], blocks[-1]], [labels[0], labels[1][:20], labels[2]])


@pytest.fixture
def adapted(model, blocks):
    with attached(model, lora_config({0: 2, 1: 8, 3: 4}), seed=0) as adapted:
        train(adapted, blocks[:-3], TrainingConfig(steps=4, batch_size=2, learning_rate=0.02), seed=0)
        yield adapted


def adapters(adapted):
    return {name: module for name, module in adapted.named_modules() if getattr(module, "lora_A", None)}


def test_a_sensitivity_is_the_slope_of_the_loss_in_the_adapters_scale(adapted, held_out):
    found, modules = sensitivities(adapted, held_out), adapters(adapted)
    assert found.keys() == modules.keys()
    scale = next(iter(modules.values())).scaling["default"]
    for name in ("0.self_attn.q_proj", "1.mlp.down_proj", "3.mlp.up_proj"):
        (chosen,) = (key for key in modules if key.endswith(name))
        losses = []
        for step in (-0.05, 0.05):
            for key, module in modules.items():
                module.scaling["default"] = scale * (SCALE + (step if key == chosen else 0))
            losses.append(block_losses(adapted, held_out).mean())
        assert found[chosen] == pytest.approx((losses[0] - losses[1]) / 0.1, rel=2e-2, abs=2e-5)


def test_the_model_is_left_as_it_was(adapted, held_out):
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    loss, training = block_losses(adapted, held_out).tolist(), adapted.training
    sensitivities(adapted, held_out)
    assert block_losses(adapted, held_out).tolist() == loss
    assert adapted.training == training
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_blocks_are_examples_of_which_every_token_counts(adapted, blocks):
    found = sensitivities(adapted, blocks[-2:])
    assert found == sensitivities(adapted, Examples.of_blocks(blocks[-2:]))


def test_what_an_untrained_adapter_contributes_is_nothing(model, held_out):
    with attached(model, lora_config({0: 2, 2: 4}), seed=0) as adapted:
        assert set(sensitivities(adapted, held_out).values()) == {0.0}
