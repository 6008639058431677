from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rankadaptor_optuna.sampling.rank_parameters import (
    MAX_CANDIDATES,
    candidate_ranks,
    checked_templates,
    middle_candidate,
    modules_of_ranks,
    rank_parameters,
)

RANK = IntDistribution(2, 12, step=2)


def layers_of(distributions, declared=None):
    return {name: layer for name, (layer, _) in rank_parameters(distributions, declared).items()}


@pytest.mark.parametrize(
    "style",
    [
        "layer_{}_rank",
        "layer_{:02d}_rank",
        "r_{}",
        "r_l{}",
        "rank{}",
        "lora_r.{}",
        "model.layers.{}.mlp.r",
        "base8_layer{}_rank",
        "Rank of layer {}",
    ],
)
@pytest.mark.parametrize("rank", [RANK, CategoricalDistribution((4, 8, 16)), IntDistribution(1, 64, log=True)])
def test_ranks_are_found_by_a_layer_number_in_their_names(style, rank):
    layers = [3, 10, 7, 11]
    space = {"lr": FloatDistribution(1e-5, 1e-2, log=True)} | {style.format(i): rank for i in layers}
    assert layers_of(space) == {style.format(i): i for i in (3, 7, 10, 11)}


def test_several_series_are_found_side_by_side_by_layer():
    space = {f"layers.{i}.{kind}.r": RANK for kind in ("mlp", "attn") for i in (0, 1, 2)}
    assert [*layers_of(space).values()] == [0, 0, 1, 1, 2, 2]
    assert layers_of(space).keys() == space.keys()


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(0, 1),
        FloatDistribution(2, 12, step=2),
        IntDistribution(-2, 12),
        CategoricalDistribution(("a", "b")),
        CategoricalDistribution((2.0, 4.0)),
        CategoricalDistribution((-1, 4)),
        CategoricalDistribution((False, True)),
        CategoricalDistribution((None, 4)),
    ],
)
def test_values_that_are_no_ordered_counts_are_no_ranks(distribution):
    assert candidate_ranks(distribution) is None
    assert layers_of({f"layer_{i}_x": distribution for i in range(8)}) == {}


@pytest.mark.parametrize(
    "names",
    [
        ["batch_size", "steps", "warmup"],
        ["layer_1_rank", "layer_2_rank"],
        ["layer_1_rank", "head_2_width", "beta2_steps"],
        ["epochs1", "2epochs", "ep3ochs"],
    ],
)
def test_fewer_than_three_names_alike_are_no_ranks(names):
    assert layers_of(dict.fromkeys(names, RANK)) == {}


def test_a_wide_range_is_thinned_but_keeps_its_ends():
    for distribution in (IntDistribution(1, 1000), IntDistribution(1, 1000, log=True)):
        values = candidate_ranks(distribution)
        assert 8 <= len(values) <= MAX_CANDIDATES
        assert (values[0], values[-1]) == (1, 1000)
        assert (np.diff(values) > 0).all()
        assert all(v == int(v) for v in values)
    assert np.median(candidate_ranks(IntDistribution(1, 1000, log=True))) < 100


def test_categorical_ranks_are_sorted_and_may_be_0():
    assert candidate_ranks(CategoricalDistribution((16, 0, 8))).tolist() == [0, 8, 16]


@pytest.mark.parametrize(
    "style", ["n_units_l{}", "kernel_{}", "x{}", "layer_{}_alpha", "layer_{}_rank_alpha", "layer_{}_bits", "lr_{}"]
)
def test_other_counts_by_layer_are_no_ranks_unless_declared(style):
    space = {style.format(i): RANK for i in range(5)}
    assert layers_of(space) == {}
    assert layers_of(space, (style,)) == {style.format(i): i for i in range(5)}


def test_declared_ranks_are_those_of_their_templates_alone_and_may_be_few():
    space = {"layer_0_rank": RANK, "a_1": RANK, "a_02": RANK, "b_1": RANK, "a_3": FloatDistribution(0, 1)}
    assert layers_of(space, ("a_{}",)) == {"a_1": 1, "a_02": 2}
    assert layers_of(space, ()) == {}


@pytest.mark.parametrize("ranks", ["layer_rank", ["a_{}", "b_{}_{}"], [3]])
def test_a_template_has_one_place_for_the_layer_number(ranks):
    with pytest.raises(ValueError, match="for the layer number"):
        checked_templates(ranks)


@pytest.mark.parametrize(
    ("styles", "modules"),
    [
        (["layer_{}_rank"], [0, 1]),
        (["q_{}_r", "v_{}_r"], ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        (["layers.{}.self_attn.r", "layers.{}.mlp.r"], ["0.mlp", "0.self_attn", "1.mlp", "1.self_attn"]),
        (["l{}_rank_gate_proj", "l{}_attention_rank"], ["0.self_attn", "0.gate_proj", "1.self_attn", "1.gate_proj"]),
        (["l{}_rank_a", "l{}_rank_b"], ["l0_rank_a", "l0_rank_b", "l1_rank_a", "l1_rank_b"]),
        (["l{}_q_rank", "l{}_q_proj_r"], ["l0_q_proj_r", "l0_q_rank", "l1_q_proj_r", "l1_q_rank"]),
    ],
)
def test_the_module_of_a_rank_is_its_layer_or_the_part_that_its_series_names(styles, modules):
    space = {style.format(i): RANK for i in range(2) for style in styles}
    assert list(modules_of_ranks(rank_parameters(space, tuple(styles))).values()) == modules


def test_a_range_of_thousands_of_millions_takes_no_memory():
    values = candidate_ranks(IntDistribution(0, 2**62))
    assert len(values) <= MAX_CANDIDATES
    assert values[-1] == 2**62


@pytest.mark.parametrize(
    ("distribution", "middle"),
    [
        (IntDistribution(4, 64, log=True), 16),
        (IntDistribution(1, 1024, log=True), 32),
        (IntDistribution(2, 12, step=2), 6),
        (CategoricalDistribution((4, 8, 16)), 8),
    ],
)
def test_the_middle_of_a_logarithmic_range_is_its_geometric_mean(distribution, middle):
    assert middle_candidate(distribution, candidate_ranks(distribution)) == pytest.approx(middle, rel=0.1)


def test_two_parameters_of_one_layer_are_told_by_their_names():
    names = ["layer_1_rank", "layer_01_rank", "layer_2_rank", "layer_02_rank"]
    ranks = rank_parameters({name: IntDistribution(2, 16) for name in names})
    assert modules_of_ranks(ranks) == {name: name for name in ranks}
