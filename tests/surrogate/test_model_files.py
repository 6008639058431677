from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rankadaptor_optuna import PerformanceModel, RankSpace
from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.grid import RankGrid
from rankadaptor_optuna.surrogate.model_files import FORMAT
from rankadaptor_optuna.surrogate.network import Network
from rankadaptor_optuna.surrogate.prior import Prior, load_prior

SPACE = RankSpace(10, budget="uniform:8", profile=np.linspace(0.1, 0.5, 10) ** 2)
UNEVEN = RankGrid(
    depth=np.linspace(0, 1, 10),
    values=[np.arange(1.0, 3 + i) for i in range(10)],
    profile=np.linspace(0.1, 0.5, 10),
    costs=np.ones(10),
    reference=np.ones(10),
)


def own_prior():
    """Returns a prior wide enough for products to depend on the memory layout, transposed as torch's weights are."""
    rng = np.random.default_rng(0)
    mlp = MLP([rng.standard_normal(s).T for s in ((32, 3), (32, 32), (6, 32))], [np.zeros(n) for n in (32, 32, 6)])
    return Prior(mlp, rng.standard_normal(6), np.full(6, 0.5))


KEPT = [
    (SPACE, {"prior": None}),
    (UNEVEN, {"prior": None}),
    (SPACE, {"prior": "pretrained", "direction": "minimize"}),
    (UNEVEN, {"prior": own_prior(), "n_ordinary": 2}),
    (SPACE, {"mode": "paper", "seed": 3, "direction": "minimize"}),
    (UNEVEN, {"mode": "paper", "hidden": (32, 16, 32), "n_ordinary": 2}),
    (SPACE, {"mode": "paper", "prior": Network(10, seed=7)}),
]


def configurations(n, seed=0):
    return np.random.default_rng(seed).choice(SPACE.candidates, (n, 10)).astype(float)


def observe(model, first, last):
    """Adds trials ``first`` to ``last``: some scores are uncertain, and there are ordinary points where they fit."""
    rng = np.random.default_rng(2)
    ranks, points, variance = rng.integers(1, 3, (30, 10)), rng.random((30, 2)), 0.1 * (rng.random(30) > 0.7)
    used = slice(first, last)
    points = points[used] if model.encode(np.ones(10)).shape == model.encode(np.ones(10), points[:1]).shape else None
    model.update(ranks[used], np.log2(1 + ranks[used]) @ np.linspace(0.2, 2, 10), points, variance[used])


def everything(model):
    test = configurations(5, seed=1)
    return np.concatenate([*model.predict(test), *model.predict_gain(test), [model.noise], model.targets])


@pytest.mark.parametrize(("space", "settings"), KEPT, ids=range(len(KEPT)))
@pytest.mark.parametrize("n_before", [0, 20])
def test_a_saved_model_predicts_and_learns_on_the_same_to_the_bit(settings, space, n_before, tmp_path):
    model = PerformanceModel(space, **settings)
    observe(model, 0, n_before)
    model.save(tmp_path / "model.safetensors")
    loaded = PerformanceModel.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(everything(loaded), everything(model))
    for each in (model, loaded):
        observe(each, n_before, 30)
    np.testing.assert_array_equal(everything(loaded), everything(model))
    rows, targets = model.features[5:], model.targets[5:]
    for each in (model, loaded):
        each.fit(rows, targets)
    np.testing.assert_array_equal(everything(loaded), everything(model))


def test_draws_of_a_loaded_model_are_the_same(tmp_path):
    model = PerformanceModel(SPACE)
    observe(model, 0, 20)
    model.save(tmp_path / "m")
    loaded = PerformanceModel.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded.mean().table, model.mean().table)
    draws = [m.sample(np.random.default_rng(0)).table for m in (model, loaded)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("settings", [{}, {"mode": "paper"}])
def test_a_model_without_ranks_is_saved_too(settings, tmp_path):
    nothing = np.zeros(0)
    model = PerformanceModel(RankGrid(nothing, [], nothing, nothing, nothing), n_ordinary=1, **settings)
    model.update(np.zeros((3, 0)), [1.0, 2.0, 3.0], [[0.1], [0.5], [0.9]])
    model.save(tmp_path / "m")
    test = np.zeros((2, 0)), [[0.2], [0.7]]
    np.testing.assert_array_equal(PerformanceModel.load(tmp_path / "m").predict(*test), model.predict(*test))


def altered(path, *, without=(), settings=None, **tensors):
    """Writes a saved model of the paper's mode with a part missing or changed."""
    model = PerformanceModel(SPACE, mode="paper")
    observe(model, 0, 5)
    model.save(path)
    with safe_open(path, framework="numpy") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if name not in without}  # noqa: SIM118
        metadata = file.metadata()
    changed = json.dumps(json.loads(metadata["settings"]) | (settings or {}))
    save_file(kept | tensors, path, metadata={**metadata, "settings": changed})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: None,
        lambda path: path.write_bytes(b"garbage"),
        lambda path: (PerformanceModel(SPACE).save(path), path.write_bytes(path.read_bytes()[:-8])),
        lambda path: load_prior("pretrained").save(path),
        lambda path: save_file({"scores": np.zeros(2)}, path, metadata={"format": "performance-model-2"}),
        lambda path: save_file({"scores": np.zeros(2)}, path, metadata={"format": FORMAT}),
        lambda path: save_file({"scores": np.zeros(2)}, path, metadata={"format": FORMAT, "settings": "{"}),
        lambda path: altered(path, without=["scores"]),
        lambda path: altered(path, without=["grid.depth"]),
        lambda path: altered(path, without=["network.moments"]),
        lambda path: altered(path, features=np.zeros((5, 9))),
        lambda path: altered(path, **{"network.parameters": np.zeros(9)}),
        lambda path: altered(path, settings={"mode": "other"}),
        lambda path: altered(path, settings={"hidden": [32, 32]}),
        lambda path: altered(path, settings={"unheard": 1}),
        lambda path: altered(path, **{"network.n_steps": np.zeros(0)}),
    ],
)
def test_a_file_that_holds_no_model_is_refused_by_name(spoil, tmp_path):
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"performance model '.*/model\.safetensors'"):
        PerformanceModel.load(tmp_path / "model.safetensors")


def test_a_model_is_no_prior(tmp_path):
    PerformanceModel(SPACE).save(tmp_path / "m")
    with pytest.raises(ValueError, match="/m' has format 'performance-model-4'; this version reads '1' and '2'"):
        PerformanceModel(SPACE, prior=tmp_path / "m")


def test_a_saved_model_keeps_the_sensitivities(tmp_path):
    grid = replace(RankGrid.from_space(SPACE), sensitivity=np.arange(10.0))
    model, ranks = PerformanceModel(grid, prior=None), configurations(20)
    observe(model, 0, 20)
    model.save(tmp_path / "m")
    again = PerformanceModel.load(tmp_path / "m")
    np.testing.assert_array_equal(again.grid.sensitivity, grid.sensitivity)
    np.testing.assert_array_equal(again.predict(ranks)[0], model.predict(ranks)[0])
