from __future__ import annotations

import pytest
import torch

from benchmarks.families.models import tiny_model
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.ranks import TARGETS, LoraSettings
from rankadaptor_optuna.recovery.lora import attached, lora_config


def adapters(model):
    """{layer index: {(rank, scaling) of each adapted module}} as PEFT really built them."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            layer = int(name.split("layers.")[1].split(".")[0])
            assert module.lora_A["default"].out_features == module.r["default"]
            found.setdefault(layer, []).append((module.r["default"], module.scaling["default"]))
    return {layer: set(modules) for layer, modules in found.items()}


def one_step(adapted, ids):
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):  # B is zero at first, so A moves in the second step only
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


def test_every_layer_of_twelve_gets_its_own_rank_and_the_same_scaling(make_model):
    """An unescaped pattern would give layers 10 and 11 what layer 1 has."""
    ranks = {i: 1 + (5 * i) % 12 for i in range(12)}
    assert len(set(ranks.values())) == 12
    config = lora_config(ranks, LoraSettings(alpha_ratio=0.5))
    with attached(make_model(num_hidden_layers=12), config, seed=0) as adapted:
        assert adapters(adapted) == {i: {(r, 0.5)} for i, r in ranks.items()}


def test_layers_of_rank_zero_or_unnamed_get_no_adapter(make_model):
    with attached(make_model(num_hidden_layers=12), lora_config({1: 0, 2: 4, 10: 8, 11: 0}), seed=0) as adapted:
        assert adapters(adapted) == {2: {(4, 2.0)}, 10: {(8, 2.0)}}


def test_parts_of_layers_get_their_own_ranks_and_the_same_scaling(make_model):
    """An unescaped pattern would give layers 10 and 11 what layer 1 has."""
    ranks = {f"{i}.{part}": 1 + (7 * i + k) % 12 for i in range(12) for k, part in enumerate(("self_attn", "mlp"))}
    ranks |= {"1.mlp": 0, "10.self_attn": 0, "5.self_attn": 0, "5.mlp": 0}
    del ranks["11.mlp"]
    with attached(make_model(num_hidden_layers=12), lora_config(ranks), seed=0) as adapted:
        found = {}
        for name, module in adapted.named_modules():
            if getattr(module, "lora_A", None):
                place = ".".join(name.split("layers.")[1].split(".")[:2])
                found.setdefault(place, set()).add((module.lora_A["default"].out_features, module.scaling["default"]))
    assert found == {module: {(rank, 2.0)} for module, rank in ranks.items() if rank}


@pytest.mark.parametrize("ranks", [{}, {0: 0, 1: 0}, {"0.mlp": 0}])
def test_nothing_to_train_is_refused(ranks):
    with pytest.raises(ValueError, match="every layer has rank 0"):
        lora_config(ranks)


def test_only_the_target_modules_are_adapted(model):
    with attached(model, lora_config({0: 2}, LoraSettings(("q_proj", "up_proj"))), seed=0) as adapted:
        names = [n.rsplit(".", 1)[1] for n, m in adapted.named_modules() if getattr(m, "lora_A", None)]
    assert names == ["q_proj", "up_proj"]
    with attached(model, lora_config({0: 2}), seed=0) as adapted:
        names = [n.rsplit(".", 1)[1] for n, m in adapted.named_modules() if getattr(m, "lora_A", None)]
    assert sorted(names) == sorted(TARGETS)


def initial(model, ranks, seed=0):
    with attached(model, lora_config(ranks), seed=seed) as adapted:
        state = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    return {k: {n: p for n, p in state.items() if f"lora_{k}" in n} for k in "AB"}


def test_a_smaller_ranks_initialisation_is_the_first_rows_of_a_larger_ones(model):
    small, large = initial(model, {0: 4, 1: 8, 2: 2}), initial(model, {0: 8, 1: 8, 2: 12})
    for name, a in small["A"].items():
        torch.testing.assert_close(a, large["A"][name][: len(a)], rtol=0, atol=0)
    assert all((b == 0).all() for state in (small, large) for b in state["B"].values())


def test_the_initialisation_is_fixed_by_the_seed_and_differs_between_modules(model):
    one, again, other = (initial(model, {0: 4, 1: 4}, seed)["A"] for seed in (0, 0, 1))
    assert all((one[name] == again[name]).all() for name in one)
    assert all((one[name] != other[name]).any() for name in one)
    same_shape = [a for name, a in one.items() if a.shape == (4, 32)]
    assert len({tuple(a.flatten().tolist()) for a in same_shape}) == len(same_shape)


def test_the_initialisation_is_as_wide_as_pefts(model):
    for a in initial(model, {0: 8})["A"].values():
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_before_training_the_adapted_model_computes_the_base_model(model, ids):
    with torch.no_grad():
        before = model(ids).logits
        with attached(model, lora_config({0: 4, 3: 2}), seed=0) as adapted:
            assert torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize("raises", [False, True])
def test_after_it_the_base_model_is_as_before_to_the_bit(model, ids, raises):
    names, before = [n for n, _ in model.named_modules()], model(ids).logits
    try:
        with attached(model, lora_config({0: 4, 3: 2}), seed=0) as adapted:
            one_step(adapted, ids)
            assert not torch.equal(adapted(ids).logits, before)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert torch.equal(model(ids).logits, before)
    assert [n for n, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")


def test_a_failing_initialisation_leaves_no_adapter_behind(model, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("rankadaptor_optuna.recovery.lora._initialise", fail)
    with pytest.raises(RuntimeError, match="out of memory"), attached(model, lora_config({0: 4}), seed=0):
        pass
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_models_are_adapted_again_and_again_without_a_warning(model, recwarn):
    for rank in (2, 8, 4):
        with attached(model, lora_config({0: rank, 1: 2}), seed=0) as adapted:
            assert adapters(adapted)[0] == {(rank, 2.0)}
    assert not [w for w in recwarn if "peft" in str(w.message)]


@pytest.mark.parametrize("mode", [True, False])
def test_the_base_model_is_left_in_its_mode(model, ids, mode):
    from rankadaptor_optuna.recovery.train import TrainingConfig, train

    model.train(mode)
    with attached(model, lora_config({0: 4}), seed=0) as adapted:
        train(adapted, ids, TrainingConfig(steps=1), seed=0)
    assert {module.training for module in model.modules()} == {mode}


def test_torchs_own_generator_is_left_alone(model):
    state = torch.random.get_rng_state()
    with attached(model, lora_config({0: 4}, LoraSettings(dropout=0.1)), seed=0):
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_transposed_weights_of_gpt2_are_adapted_without_a_warning(recwarn, ids):
    gpt2 = tiny_model("gpt2")
    space = RankSpace.from_model(gpt2)
    with attached(gpt2, lora_config(space.uniform(), LoraSettings(space.targets)), seed=0) as adapted:
        assert {config.fan_in_fan_out for config in adapted.peft_config.values()} == {True}
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
