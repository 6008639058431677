from __future__ import annotations

import json

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from rankadaptor_optuna import RankSpace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layers": 0}, "at least 1, got 0"),
        ({"layers": []}, r"increasing and not empty, got \[\]"),
        ({"layers": [2, 1]}, r"increasing and not empty, got \[2, 1\]"),
        ({"layers": [1, 1]}, r"increasing and not empty, got \[1, 1\]"),
        ({"layers": [2, 4]}, r"must lie in 0\.\.3, got \[2, 4\]"),
        ({"layers": [-1, 2]}, r"must lie in 0\.\.3, got \[-1, 2\]"),
        ({"costs": [1, 2, 3]}, r"costs needs one value per searched layer \(4\), got 3"),
        ({"profile": [0.5] * 5}, r"profile needs one value per searched layer \(4\), got 5"),
        ({"costs": [1, 2, 0, 4]}, "costs must be positive, got 0"),
        ({"candidates": ()}, r"must not be empty: give the ranks .* e\.g\. \(2, 4, 8\)"),
        ({"candidates": (2, 4.5)}, r"must be integers, got \[2, 4\.5\]"),
        ({"candidates": (True, 4)}, r"must be integers, got \[True, 4\]"),
        ({"candidates": (2, float("inf"))}, r"must be integers, got \[2, inf\]"),
        ({"candidates": (2, "x")}, r"must be integers, got \[2, 'x'\]"),
        ({"candidates": (4, 2)}, r"strictly increasing, got \[4, 2\]"),
        ({"candidates": (2, 2)}, r"strictly increasing, got \[2, 2\]"),
        ({"candidates": (-2, 4)}, r"0 is allowed and means no adapter.*got \[-2, 4\]"),
        ({"candidates": (0,)}, r"0 is allowed and means no adapter.*got \[0\]"),
        ({"granularity": "module"}, '"layer" or "sublayer", got \'module\''),
        ({"granularity": "sublayer", "costs": [1] * 4}, r"costs needs one value per searched sublayer \(8\), got 4"),
        ({"budget": "lots"}, "a number or \"uniform:RANK\", got 'lots'"),
        ({"budget": "uniform:"}, "a number or \"uniform:RANK\", got 'uniform:'"),
        ({"budget": "uniform:x"}, "a number or \"uniform:RANK\", got 'uniform:x'"),
        ({"budget": 0}, "positive and finite, got 0"),
        ({"budget": -3}, "positive and finite, got -3"),
        ({"budget": float("inf")}, "positive and finite, got inf"),
        ({"budget": "nan"}, "positive and finite, got 'nan'"),
        ({"budget": 7}, r"budget 7 is below .*rank 2 in every layer costs 8.*Raise the budget or add a smaller"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        RankSpace(**{"n_layers": 4} | arguments)


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [(None, None), (50, 50), (50.5, 50.5), ("50", 50), ("uniform:8", 8 * 60), ("uniform:7.5", 7.5 * 60)],
)
def test_a_budget_is_a_number_or_the_cost_of_one_rank_everywhere(budget, parameters):
    assert RankSpace(3, (0, 8, 12), budget, costs=[10, 20, 30]).budget == parameters


def test_a_uniform_budget_pays_for_the_fixed_layers_too():
    space = RankSpace(3, budget="uniform:8", layers=[1], costs=[10], fixed_ranks={0: 8, 2: 8}, fixed_cost=500)
    assert space.budget == 8 * 10 + 500


@pytest.mark.parametrize(("budget", "rank"), [(None, 12), ("uniform:8", 8), ("uniform:7", 6), (24, 8), (23.9, 6)])
def test_uniform_is_the_largest_candidate_within_the_budget_everywhere(budget, rank):
    assert RankSpace(3, budget=budget).uniform() == {0: rank, 1: rank, 2: rank}


def test_cost_is_rank_times_cost_per_rank_and_the_fixed_layers():
    space = RankSpace(4, layers=[1, 3], costs=[10, 100], fixed_ranks={0: 8}, fixed_cost=56)
    assert space.cost({1: 2, 3: 4}) == 20 + 400 + 56


@pytest.mark.parametrize("method", ["cost", "with_fixed"])
def test_every_searched_layer_needs_a_rank(method):
    with pytest.raises(ValueError, match=r"no rank for layers \[1, 3\]; give one for each of \[1, 2, 3\]"):
        getattr(RankSpace(4, layers=[1, 2, 3]), method)({0: 8, 2: 8})
    with pytest.raises(ValueError, match=r"no rank for sublayers \['1\.mlp'\]; give one for each of \['1\.self_attn'"):
        getattr(RankSpace(2, layers=[1], granularity="sublayer"), method)({"1.self_attn": 8, 1: 8})


@pytest.mark.parametrize(
    ("ranks", "feasible"),
    [({0: 8, 1: 8}, True), ({0: 12, 1: 4}, True), ({0: 12, 1: 6}, False), ({0: 3, 1: 4}, False), ({0: 8}, False)],
)
def test_feasible_means_candidates_within_the_budget(ranks, feasible):
    assert RankSpace(2, budget="uniform:8").is_feasible(ranks) is feasible


@pytest.mark.parametrize(
    ("candidates", "distribution"),
    [
        ((2, 4, 6), IntDistribution(2, 6, step=2)),
        ((0, 8), IntDistribution(0, 8, step=8)),
        ((8,), IntDistribution(8, 8)),
        ((2, 4, 8), CategoricalDistribution((2, 4, 8))),
    ],
)
def test_evenly_spaced_candidates_are_integers_with_a_step_and_others_categorical(candidates, distribution):
    assert RankSpace(2, candidates).distributions() == {"layer_00_rank": distribution, "layer_01_rank": distribution}


def test_names_carry_the_layers_index_and_sort_by_it():
    assert [*RankSpace(12, layers=[3, 10]).distributions()] == ["layer_03_rank", "layer_10_rank"]
    names = [*RankSpace(120).distributions()]
    assert names[7] == "layer_007_rank"
    assert names == sorted(names)


@pytest.mark.parametrize(
    "space",
    [
        RankSpace(3),
        RankSpace(
            5,
            (0, 4, 16),
            "uniform:4",
            layers=[1, 3],
            costs=[10, 22.5],
            fixed_ranks={0: 8, 4: 2},
            fixed_cost=99,
            profile=[1 / 3, 0],
        ),
        RankSpace(
            3, (0, 4, 8, 16, 32), "uniform:4", layers=[1], costs=[3, 7], fixed_ranks={0: 8}, granularity="sublayer"
        ),
    ],
)
def test_a_space_survives_json(space):
    again = RankSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space
    assert hash(again) == hash(space)
    assert again.distributions() == space.distributions()
    assert again.uniform() == space.uniform()
    assert again.with_fixed(again.uniform()) == space.with_fixed(space.uniform())


@pytest.mark.parametrize("described", [{}, {**RankSpace(3).to_dict(), "format": 3}, {"format": 1, "weights": [1]}])
def test_a_description_of_something_else_is_refused(described):
    with pytest.raises(ValueError, match="not a rank space of format 1 or 2"):
        RankSpace.from_dict(described)


def test_a_space_of_layers_is_described_as_before_there_were_sublayers():
    described = {
        "format": 1,
        "n_layers": 4,
        "candidates": [2, 8],
        "budget": 240.0,
        "layers": [1, 2],
        "costs": [10.0, 20.0],
        "fixed_ranks": {"0": 8},
        "fixed_cost": 0.0,
        "profile": [0.5, 0.25],
    }
    space = RankSpace.from_dict(described)
    assert space == RankSpace(
        4, (2, 8), "uniform:8", layers=[1, 2], costs=[10, 20], fixed_ranks={0: 8}, profile=[0.5, 0.25]
    )
    assert space.to_dict() == described
    assert RankSpace(4, granularity="sublayer").to_dict()["format"] == 2


def test_by_sublayer_attention_and_mlp_have_ranks_of_their_own():
    space = RankSpace(
        12, (0, 4, 8), "uniform:4", layers=[3, 10], costs=[10, 20, 30, 40], fixed_ranks={0: 8}, granularity="sublayer"
    )
    assert space.modules == ("3.self_attn", "3.mlp", "10.self_attn", "10.mlp")
    names = [f"layer_{layer}_{part}_rank" for layer in ("03", "10") for part in ("self_attn", "mlp")]
    assert [*space.distributions()] == names
    ranks = space.suggest(optuna.trial.FixedTrial(dict(zip(names, (0, 8, 4, 0), strict=True))))
    assert ranks == {"3.self_attn": 0, "3.mlp": 8, "10.self_attn": 4, "10.mlp": 0}
    assert space.budget == 4 * 100
    assert space.cost(ranks) == 8 * 20 + 4 * 30
    assert space.uniform() == dict.fromkeys(space.modules, 4)
    assert [*space.with_fixed(ranks).items()][:3] == [("0.self_attn", 8), ("0.mlp", 8), ("3.self_attn", 0)]
    assert {name: space.modules[part] for name, part in space.series.items()} == {
        "self_attn": ("3.self_attn", "10.self_attn"),
        "mlp": ("3.mlp", "10.mlp"),
    }


def test_the_ranks_of_all_adapted_layers_are_in_depth_order():
    space = RankSpace(4, layers=[1, 2], fixed_ranks={3: 8, 0: 8})
    assert [*space.with_fixed({2: 4, 1: 6}).items()] == [(0, 8), (1, 6), (2, 4), (3, 8)]


@pytest.fixture(scope="module")
def pruned(make_model, tokenizer, texts):
    from rankadaptor_optuna.pruning import prune

    settings = {"calibration": texts, "multiple_of": 4, "n_samples": 2, "sample_length": 16}
    return prune(make_model(num_hidden_layers=6, num_key_value_heads=4), tokenizer, ratio=0.3, **settings)


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_the_cost_read_off_a_pruned_model_is_what_peft_trains(pruned, targets):
    from rankadaptor_optuna.ranks import TARGETS, LoraSettings
    from rankadaptor_optuna.recovery.lora import attached, lora_config

    space = RankSpace.from_model(pruned, targets=targets)
    assert len(set(space.costs)) > 1  # pruning was uneven
    ranks = dict(zip(space.layers, space.candidates, strict=False))
    config = lora_config(space.with_fixed(ranks), LoraSettings(targets or TARGETS))
    with attached(pruned.model, config, seed=0) as adapted:
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert space.cost(ranks) == trained


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_the_cost_of_each_sublayer_is_what_peft_trains_there(pruned, targets):
    from rankadaptor_optuna.ranks import TARGETS, LoraSettings
    from rankadaptor_optuna.recovery.lora import attached, lora_config

    space = RankSpace.from_model(pruned, (0, 2, 4, 8, 12), targets=targets, granularity="sublayer")
    costs = dict(zip(space.modules, space.costs, strict=True))
    assert all(len(set(space.costs[part])) > 1 for part in space.series.values())  # pruning was uneven in both
    ranks = {module: space.candidates[i % 5] for i, module in enumerate(space.modules)}
    trained = dict.fromkeys(costs, 0)
    with attached(
        pruned.model, lora_config(space.with_fixed(ranks), LoraSettings(targets or TARGETS)), seed=0
    ) as adapted:
        parameters = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    for name, n in parameters.items():
        module = ".".join(name.split("layers.")[1].split(".")[:2])
        trained[module] = trained.get(module, 0) + n
    assert {module: trained[module] for module in ranks} == {module: ranks[module] * costs[module] for module in ranks}
    assert sum(parameters.values()) == space.cost(ranks)


def test_by_sublayer_the_same_layers_are_searched_at_the_same_total_cost(pruned):
    layers, parts = (RankSpace.from_model(pruned, granularity=g) for g in ("layer", "sublayer"))
    assert (parts.layers, parts.fixed_ranks, parts.fixed_cost) == (layers.layers, layers.fixed_ranks, layers.fixed_cost)
    assert parts.budget == layers.budget
    attention, mlp = (parts.costs[part] for part in parts.series.values())
    assert tuple(a + b for a, b in zip(attention, mlp, strict=True)) == layers.costs


def test_each_sublayers_profile_is_what_pruning_took_from_it(pruned):
    space = RankSpace.from_model(pruned, granularity="sublayer")
    taken = [pruned.profile[layer] for layer in space.layers]
    attention, mlp = (space.profile[part] for part in space.series.values())
    assert attention == pytest.approx([entry.heads_removed for entry in taken])
    assert mlp == pytest.approx([entry.channels_removed for entry in taken])
    assert attention != mlp


def test_layers_that_pruning_left_whole_are_fixed(pruned):
    space = RankSpace.from_model(pruned, unpruned_rank=6)
    whole = [entry.layer for entry in pruned.profile if entry.parameters_removed == 0]
    assert whole == [0, 5]
    assert space.fixed_ranks == {0: 6, 5: 6}
    assert space.layers == (1, 2, 3, 4)
    assert RankSpace.from_model(pruned, unpruned_rank=None).layers == (0, 1, 2, 3, 4, 5)


def test_the_profile_is_the_share_of_linear_weights_lost(pruned):
    space = RankSpace.from_model(pruned, unpruned_rank=None)
    sizes = [sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in pruned.model.model.layers]
    assert space.profile == pytest.approx([1 - size / max(sizes) for size in sizes])
    assert max(space.profile) > 0.3


def test_every_layer_of_a_dense_model_is_searched(model):
    space = RankSpace.from_model(model)
    assert space.layers == (0, 1, 2, 3)
    assert space.fixed_ranks == {}
    assert space.profile == (0,) * 4


def test_a_model_without_layers_to_adapt_is_refused(model):
    import torch

    with pytest.raises(ValueError, match=r"Sequential has no linear modules below 'layers\.<i>\.'"):
        RankSpace.from_model(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no modules named \['c_attn'\]"):
        RankSpace.from_model(model, targets=["c_attn"])


def test_sublayers_that_are_not_there_to_adapt_are_named(model):
    import torch

    with pytest.raises(ValueError, match=r"self_attn and mlp and nowhere else.* not so for \['0\.mlp', '1\.mlp', "):
        RankSpace.from_model(model, targets=["q_proj"], granularity="sublayer")
    model.model.layers[1].router = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"not so for \['1\.router'\]; adapt others, or use granularity='layer'"):
        RankSpace.from_model(model, granularity="sublayer")


@pytest.mark.parametrize("candidates", [(2, 4, 6), (2, 4, 8)])
def test_suggest_returns_ranks_by_layer_index(candidates):
    space = RankSpace(12, candidates, layers=[3, 10])
    trial = optuna.trial.FixedTrial({"layer_03_rank": 2, "layer_10_rank": candidates[-1]})
    assert space.suggest(trial) == {3: 2, 10: candidates[-1]}


@pytest.mark.skipif(not hasattr(optuna.trial.Trial, "set_constraint"), reason="Optuna 4 has no set_constraint")
def test_trials_of_another_sampler_over_the_budget_are_marked_infeasible():
    space = RankSpace(4, budget="uniform:6", costs=[1, 2, 3, 4])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: space.cost(space.suggest(trial)), n_trials=20)
    over = {t.number: t.value - space.budget for t in study.trials if t.value > space.budget}
    assert 0 < len(over) < 20
    constraints = {t.number: t.constraints["rankadaptor:budget"] for t in study.trials}
    assert {number: value for number, value in constraints.items() if value > 0} == over


@pytest.mark.skipif(not hasattr(optuna.trial.Trial, "set_constraint"), reason="needs Optuna 5")
def test_a_trial_at_the_budget_is_feasible_though_fractional_costs_round():
    space = RankSpace(3, (1, 3), budget=0.3 * 3, costs=[0.1] * 3)  # 0.9 < 3 * 0.1 + 3 * 0.1 + 3 * 0.1
    assert space.cost(space.uniform()) > space.budget
    study = optuna.create_study()
    study.enqueue_trial(space.to_params(space.uniform()))
    study.optimize(lambda trial: space.cost(space.suggest(trial)), n_trials=1)
    assert study.trials[0].constraints["rankadaptor:budget"] == 0


@pytest.mark.parametrize(
    ("template", "granularity", "names"),
    [
        ("layer_{}_rank", "layer", ["layer_0_rank", "layer_1_rank"]),
        ("r{:03}", "layer", ["r000", "r001"]),
        ("l{}_{}_r", "sublayer", ["l0_self_attn_r", "l0_mlp_r", "l1_self_attn_r", "l1_mlp_r"]),
    ],
)
def test_parameters_are_named_by_a_template_which_the_study_keeps(template, granularity, names):
    space = RankSpace(2, (2, 4), granularity=granularity, name=template)
    assert [*space.names] == [*space.distributions()] == names
    assert RankSpace.from_dict(space.to_dict()) == space


@pytest.mark.parametrize(
    ("template", "granularity"),
    [("rank", "layer"), ("r{}{}", "layer"), ("r{}", "sublayer"), ("{x}", "layer"), ("{", "layer")],
)
def test_a_template_tells_all_parameters_apart(template, granularity):
    with pytest.raises(ValueError, match=r"name must tell every (sub)?layer apart"):
        RankSpace(2, (2, 4), granularity=granularity, name=template)


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("layer", {1: 7.0, 12: 40.0}),
        ("sublayer", {"1.self_attn": 3.0, "1.mlp": 4.0, "12.self_attn": 0.0, "12.mlp": 40.0}),
    ],
)
def test_what_modules_have_is_summed_over_what_has_a_rank(granularity, expected):
    space = RankSpace(13, layers=[1, 12], granularity=granularity)
    values = {"self_attn.q_proj": 1.0, "self_attn.o_proj": 2.0, "mlp.up_proj": 4.0}
    named = {f"base_model.model.model.layers.1.{name}": value for name, value in values.items()}
    named |= {"model.layers.2.mlp.up_proj": 100.0, "layers.12.mlp.up_proj": 40.0, "lm_head": 1000.0}
    assert space.by_module(named) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layers": "4"}, "n_layers must be an integer, got '4'"),
        ({"n_layers": 4.5}, "n_layers must be an integer, got 4.5"),
        ({"candidates": 8}, "candidates must be a list of numbers, got 8"),
        ({"candidates": "2,4"}, "candidates must be a list of numbers, got '2,4'"),
        ({"layers": 2}, "layers must be a list of numbers, got 2"),
        ({"costs": 5}, "costs must be a list of numbers, got 5"),
        ({"targets": "q_proj"}, "targets must be a list of names, got 'q_proj'"),
        ({"fixed_cost": float("nan")}, "fixed_cost must be finite and at least 0, got nan"),
        ({"fixed_cost": -5}, "fixed_cost must be finite and at least 0, got -5"),
        ({"fixed_ranks": {9: 8}}, "of layers that are not searched, got {9: 8}"),
        ({"fixed_ranks": {1: 8}}, "of layers that are not searched, got {1: 8}"),
        ({"layers": [1, 2], "fixed_ranks": {0: -8}}, "of layers that are not searched, got {0: -8}"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RankSpace(**{"n_layers": 4, **arguments})


def test_a_budget_that_limits_nothing_is_said(model):
    with pytest.warns(UserWarning, match=r"uniform:16 exceeds the costliest configuration, rank 8 .*limits nothing"):
        space = RankSpace.from_model(model, (2, 4, 8), "uniform:16")
    assert space.costliest == space.budget / 2
