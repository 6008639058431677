"""Opens files that earlier versions wrote (``data/``) and expects what those versions computed from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rankadaptor_optuna import PerformanceModel
from rankadaptor_optuna.surrogate.prior import Prior, load_prior

DATA = Path(__file__).parent / "data"


def test_a_prior_of_format_1_is_read():
    prior = load_prior(DATA / "prior-1.safetensors")
    assert prior.checksum == "4b0a03f7c495"
    assert prior.card["learned_from"] == "600 simulated recoveries (benchmarks/pretrain_prior.py), no real study"
    assert prior.mlp(np.asarray([0.5, 0.25, -1.0]))[:2] == pytest.approx([-0.1829021105724063, 1.0394330618938064])


def test_a_prior_of_format_2_with_an_input_for_the_sensitivity_is_read_as_where_it_was_unknown(tmp_path):
    prior = load_prior(DATA / "prior-2.safetensors")
    assert prior.checksum == "8260af472f13"  # the weights in the file, by which studies name it
    assert prior.card["cpu_hours"] == 2.4
    assert prior.mlp(np.asarray([0.5, 0.25, -1.0]))[:2] == pytest.approx([-1.3423371075872592, -1.9710942854479356])
    prior.save(tmp_path / "p")
    again = Prior.load(tmp_path / "p")
    assert again.mlp.weights[0].shape == (3, 32)
    assert again.mlp(np.ones(3)).tolist() == prior.mlp(np.ones(3)).tolist()


@pytest.mark.parametrize(
    ("name", "mean", "std", "gain", "noise"),
    [
        (
            "performance-model-4",
            [51.931846362421815, 66.85170823388862],
            [4.248460929927689, 8.028718843805036],
            [-2.548776018547063, -13.972216546661123],
            3.025166547023355,
        ),
        (
            "performance-model-4-paper",
            [54.18458281460192, 54.429443661205575],
            [8.622179635742436, 8.622179635742436],
            [0.0006799553256140855, -0.2216607405569472],
            8.622179635742436,
        ),
    ],
)
def test_a_performance_model_of_format_4_predicts_what_it_did(name, mean, std, gain, noise):
    model = PerformanceModel.load(DATA / f"{name}.safetensors")
    ranks = [[2.0, 4, 8, 2, 4, 8], [8.0] * 6]
    found = model.predict(ranks, [[0.1], [0.7]])
    assert found[0] == pytest.approx(mean, rel=1e-9)
    assert found[1] == pytest.approx(std, rel=1e-9)
    assert model.predict_gain(ranks)[0] == pytest.approx(gain, rel=1e-9)
    assert model.noise == pytest.approx(noise, rel=1e-9)


@pytest.mark.parametrize(
    ("read", "number", "readable"),
    [
        (load_prior, "3", "'1' and '2'"),
        (PerformanceModel.load, "performance-model-5", "'performance-model-4'"),
        (PerformanceModel.load, "performance-model-3", "'performance-model-4'"),
    ],
)
def test_an_unknown_format_number_is_refused_in_one_line(read, number, readable, tmp_path):
    save_file({"mean": np.zeros(2)}, tmp_path / "f", metadata={"format": number})
    with pytest.raises(ValueError, match=rf"^[a-z ]+ '.*/f' has format '{number}'; this version reads {readable}\.$"):
        read(tmp_path / "f")
