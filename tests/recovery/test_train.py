from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rankadaptor_optuna.ranks import LoraSettings
from rankadaptor_optuna.recovery.data import IGNORED, Examples
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.train import TrainingConfig, batches, learning_rate_factor, train

CONFIG = TrainingConfig(steps=6, batch_size=2, learning_rate=0.02)


def trained(model, blocks, *, seed=0, dropout=0.0, config=CONFIG, on_step=None):
    """Result and weights of a short recovery."""
    lora = lora_config({i: 4 for i in range(4)}, LoraSettings(dropout=dropout))
    with attached(model, lora, seed=0) as adapted:
        result = train(adapted, blocks, config, seed=seed, on_step=on_step)
        weights = torch.cat([p.detach().flatten().clone() for p in adapted.parameters() if p.requires_grad])
    return result, weights


def test_it_learns(model, blocks):
    losses = []
    result, _ = trained(
        model,
        blocks,
        config=TrainingConfig(steps=20, batch_size=2, learning_rate=0.02),
        on_step=lambda step, loss: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == [*range(20)]
    assert losses[-1][1] < losses[0][1] - 1
    assert result.loss == pytest.approx(sum(loss for _, loss in losses[-5:]) / 5)
    assert result.tokens == 20 * 2 * 24
    assert result.seconds > 0


def test_a_step_is_adamw_on_the_clipped_gradient_of_its_own_batch(model, blocks):
    config = TrainingConfig(steps=3, batch_size=2, learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.05)
    _, found = trained(model, blocks, config=config)
    with attached(model, lora_config({i: 4 for i in range(4)}), seed=0) as adapted:
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        for step, rows in enumerate(batches(5, config, seed=0)):
            if step == 0:
                optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
            else:  # warm-up is one step, then cosine over the two left
                optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 2))
            gradients = torch.autograd.grad(adapted(blocks[rows], labels=blocks[rows]).loss, parameters)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            assert norm > 0.05
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient * 0.05 / (norm + 1e-6)
            optimizer.step()
        expected = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_whatever_ran_before(model, blocks):
    first, weights = trained(model, blocks, dropout=0.5)
    torch.manual_seed(99)
    again, same = trained(model, blocks, dropout=0.5)
    assert torch.equal(weights, same)
    assert first.loss == again.loss


def test_another_seed_sees_the_data_in_another_order(model, blocks):
    config = replace(CONFIG, steps=2)
    assert not torch.equal(trained(model, blocks, config=config)[1], trained(model, blocks, config=config, seed=1)[1])


def test_only_the_adapter_is_trained(model, blocks):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, blocks)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_models_mode_and_torchs_generator_are_left_as_they_were(model, blocks):
    state = torch.random.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        with attached(model, lora_config({0: 2}, LoraSettings(dropout=0.5)), seed=0) as adapted:
            adapted.train(mode)
            train(adapted, blocks, CONFIG, seed=0)
            assert adapted.training is mode
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step(model, blocks):
    def spoil(step, loss):
        if step == 1:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="training loss is nan at step 2; lower the learning rate"):
        trained(model, blocks, on_step=spoil)


@pytest.mark.parametrize(("n_blocks", "steps", "batch_size"), [(5, 10, 2), (5, 3, 2), (3, 2, 8), (1, 2, 2)])
def test_every_block_is_seen_before_any_is_seen_again(n_blocks, steps, batch_size):
    rows = batches(n_blocks, TrainingConfig(steps=steps, batch_size=batch_size), seed=0)
    assert [len(row) for row in rows] == [batch_size] * steps
    flat = [i for row in rows for i in row]
    for start in range(0, len(flat), n_blocks):
        epoch = flat[start : start + n_blocks]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(n_blocks))


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.4, 1), (4, 10)])
def test_epochs_are_passes_over_the_data(epochs, steps):
    config = TrainingConfig(batch_size=2, epochs=epochs)
    assert config.for_examples(5) == TrainingConfig(steps=steps, batch_size=2)
    assert len(batches(5, config, seed=0)) == steps


def test_training_takes_its_steps_from_the_epochs(model, blocks):
    seen = []
    trained(model, blocks, config=TrainingConfig(batch_size=2, epochs=1), on_step=lambda step, loss: seen.append(step))
    assert seen == [0, 1, 2]


def test_batches_are_fixed_by_the_seed_and_each_pass_is_a_fresh_shuffle():
    config = TrainingConfig(steps=4, batch_size=16)
    rows = batches(32, config, seed=0)
    assert rows == batches(32, config, seed=0) != batches(32, config, seed=1)
    assert rows[:2] != rows[2:]


def test_the_learning_rate_may_fall_along_a_line_after_a_number_of_warm_up_steps():
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 3, 10)
    expected = []
    for _ in range(10):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    config = TrainingConfig(steps=10, warmup=3, linear_decay=True)
    ours = [learning_rate_factor(step, config) for step in range(10)]
    assert ours[:3] == pytest.approx(expected[:3])  # ours starts with a step that learns, theirs with one at 0
    assert ours[3:] == pytest.approx(expected[2:9])


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.1), (10, 0.1), (100, 0.25), (8, 0.0)])
def test_the_learning_rate_warms_up_to_its_peak_and_ends_near_zero(steps, warmup):
    rates = [learning_rate_factor(step, TrainingConfig(steps, warmup=warmup)) for step in range(steps)]
    peak = max(1, round(warmup * steps)) - 1
    assert rates[: peak + 1] == pytest.approx([(i + 1) / (peak + 1) for i in range(peak + 1)])
    assert max(rates) == rates[peak] == 1
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert rates[-1] < 0.04 * max(1, 10 / steps) ** 2


def test_training_in_half_precision_keeps_the_adapter_in_float32(model, blocks):
    result, weights = trained(model.to(torch.bfloat16), blocks)
    assert math.isfinite(result.loss)
    assert weights.dtype is torch.float32


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "learning_rate", "max_grad_norm", "micro_batch_size", "epochs"]
)
def test_a_setting_that_is_not_positive_is_named(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be (positive|an integer), got {value}"):
            TrainingConfig(**{name: value})


@pytest.fixture
def uneven():
    """Examples of differing length, of which some tokens count."""
    ids = [torch.arange(n) * 7 % 256 for n in (24, 9, 17, 5, 12)]
    labels = [torch.cat([torch.full((3,), IGNORED), row[3:]]) for row in ids]
    return Examples(ids, labels)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up_to_the_step_of_the_whole_batch(model, uneven, micro):
    config = TrainingConfig(steps=4, batch_size=4, learning_rate=0.01)
    whole, weights = trained(model, uneven, config=config)
    parts, same = trained(model, uneven, config=replace(config, micro_batch_size=micro))
    torch.testing.assert_close(same, weights, rtol=1e-3, atol=1e-5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.tokens == whole.tokens == sum(len(uneven.ids[i]) for rows in batches(5, config, 0) for i in rows)


def test_the_loss_of_a_step_is_the_mean_over_the_targets_of_its_batch(model, uneven):
    losses = []
    config = TrainingConfig(steps=1, batch_size=5, learning_rate=0.01)
    trained(model, uneven, config=config, on_step=lambda step, loss: losses.append(loss))
    total = n = 0
    with torch.no_grad():
        for ids, labels in zip(uneven.ids, uneven.labels, strict=True):
            targets = labels[1:] != IGNORED
            each = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total, n = total + float(each[targets].sum()), n + int(targets.sum())
    assert losses == [pytest.approx(total / n, rel=1e-5)]


def test_gradient_checkpointing_changes_nothing_but_memory(model, blocks):
    config = replace(CONFIG, steps=3)
    _, weights = trained(model, blocks, config=config)
    _, same = trained(model, blocks, config=replace(config, gradient_checkpointing=True))
    torch.testing.assert_close(same, weights)
    assert not model.is_gradient_checkpointing


def test_parameters_that_no_gradient_reaches_are_named(model, ids):
    model.idle = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"no gradient reached 2 trainable tensors.*: idle\.weight, idle"):
        train(model, ids, TrainingConfig(steps=1), seed=0)


@pytest.mark.parametrize("settings", [{"steps": "8"}, {"steps": 2.5}, {"batch_size": True}, {"learning_rate": "3e-3"}])
def test_a_setting_of_another_type_is_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be an? "):
        TrainingConfig(**settings)


@pytest.mark.parametrize("name", ["learning_rate", "warmup", "weight_decay", "epochs"])
def test_an_infinite_setting_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        TrainingConfig(**{name: float("inf")})
