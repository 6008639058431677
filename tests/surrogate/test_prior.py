from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.prior import Prior, load_prior


@pytest.fixture
def prior():
    rng = np.random.default_rng(0)
    sizes = ((5, 3), (4, 5), (2, 4))
    mlp = MLP([rng.standard_normal(s).T for s in sizes], [rng.standard_normal(s[0]) for s in sizes])  # not contiguous
    return Prior(mlp, rng.standard_normal(2), rng.random(2))


def arrays(prior):
    return [*prior.mlp.weights, *prior.mlp.biases, prior.mean, prior.std]


def test_a_saved_prior_is_read_back_to_the_bit(prior, tmp_path):
    prior.save(tmp_path / "p.safetensors")
    for used in (Prior.load(tmp_path / "p.safetensors"), load_prior(str(tmp_path / "p.safetensors"))):
        assert [a.dtype for a in arrays(used)] == [np.float64] * 8
        for a, b in zip(arrays(used), arrays(prior), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_card_is_kept_beside_the_weights(prior, tmp_path):
    card = {"tasks": ["a", "b"], "gain": 0.25}
    dataclasses.replace(prior, card=card).save(tmp_path / "p.safetensors")
    assert Prior.load(tmp_path / "p.safetensors").card == card


def test_the_checksum_is_that_of_the_weights_alone(prior):
    assert dataclasses.replace(prior, card={"a": 1}).checksum == prior.checksum
    assert dataclasses.replace(prior, mean=prior.mean + 1e-12).checksum != prior.checksum
    assert Prior.loads(prior.dumps(), "prior").checksum == prior.checksum


def test_safetensors_of_something_else_are_no_prior(tmp_path):
    save_file({"std": np.zeros(2)}, tmp_path / "p.safetensors", metadata={"format": "1"})
    with pytest.raises(ValueError, match=r"cannot read the prior '.*p\.safetensors': .* its tensors are std"):
        load_prior(tmp_path / "p.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the prior '.*nothing\.safetensors'"):
        load_prior(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 200])
def test_a_file_that_is_no_prior_is_named(content, tmp_path):
    (tmp_path / "p.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the prior '.*p\.safetensors'"):
        load_prior(tmp_path / "p.safetensors")


def test_a_truncated_file_is_refused(prior, tmp_path):
    prior.save(tmp_path / "p.safetensors")
    content = (tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "p.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match="cannot read the prior"):
        load_prior(tmp_path / "p.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "3"}])
def test_another_format_is_refused_with_the_one_that_is_read(metadata, tmp_path):
    save_file({"mean": np.zeros(2)}, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"p\.safetensors' has format .*; this version reads '1' and '2'"):
        load_prior(tmp_path / "p.safetensors")


def test_there_is_a_shipped_prior_and_it_can_be_switched_off():
    shipped = load_prior("pretrained")
    assert np.isfinite(np.concatenate([a.ravel() for a in arrays(shipped)])).all()
    assert (shipped.std > 0).all()
    assert load_prior(None) is None


def hostile(**changed):
    """Tensors of a prior that anyone may have written into a shared database."""
    sizes = ((3, 5), (5, 2))
    tensors = {"mean": np.zeros(2), "std": np.ones(2)}
    for i, (n_in, n_out) in enumerate(sizes):
        tensors |= {f"mlp.{i}.weight": np.ones((n_in, n_out)), f"mlp.{i}.bias": np.zeros(n_out)}
    named = {name.replace("_", "."): value for name, value in changed.items()}
    return {name: value for name, value in {**tensors, **named}.items() if value is not None}


def test_the_tensors_that_the_next_test_changes_are_a_prior():
    data = save(hostile(), {"format": "2"})
    assert Prior.loads(data, "prior").mlp.n_features == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": np.array([0, np.nan])},
        {"std": np.array([1, np.inf])},
        {"std": np.array([1.0, 0.0])},
        {"std": np.array([1.0, -1.0])},
        {"mean": np.full(2, 1e300)},
        {"mean": np.full(2, 1e5)},
        {"std": np.full(2, 1e5)},
        {"mlp_1_weight": np.full((5, 2), 1e5)},
        {"mean": np.zeros(3)},
        {"mean": np.zeros((2, 1))},
        {"mean": np.zeros(2, np.int8)},
        {"mean": np.array(0.0)},
        {"mlp_0_weight": np.ones((3, 5), np.int8)},
        {"mlp_0_weight": np.full((3, 5), np.nan)},
        {"mlp_0_weight": np.ones((2, 5))},
        {"mlp_0_weight": np.ones((7, 5))},
        {"mlp_0_weight": np.ones(15)},
        {"mlp_0_bias": np.zeros(4)},
        {"mlp_0_bias": None},
        {"mlp_1_weight": np.ones((5, 0)), "mlp_1_bias": np.zeros(0), "mean": np.zeros(0), "std": np.zeros(0)},
        {"mlp_1_weight": np.ones((4, 2))},
        {
            "mlp_1_weight": np.ones((5, 2000)),
            "mlp_1_bias": np.zeros(2000),
            "mean": np.zeros(2000),
            "std": np.ones(2000),
        },
        {"mlp_3_weight": np.ones((2, 2)), "mlp_3_bias": np.zeros(2)},
        {"extra": np.ones(2)},
        {"mean": None},
    ],
)
def test_a_prior_that_no_trial_could_use_is_refused_when_it_is_read(changed):
    with pytest.raises(ValueError, match="cannot read the prior x: ") as caught:
        Prior.loads(save(hostile(**changed), {"format": "2"}), "prior x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "card", ["[" * 100_000, '{"a": ' * 500 + "1" + "}" * 500, "[1]", "null", "7", '"text"', "{", "9" * 5000]
)
def test_a_card_that_is_no_object_of_a_few_levels_is_refused(card):
    with pytest.raises(ValueError, match="cannot read the prior x: "):
        Prior.loads(save(hostile(), {"format": "2", "card": card}), "prior x")
