from __future__ import annotations

import numpy as np
import pytest
from optuna.samplers import PartialFixedSampler

from rankadaptor_optuna import RankSpace, recommend
from tests.sampling.common import (
    HAS_SET_CONSTRAINT,
    SPACE,
    broken_constraints,
    is_uniform,
    new_study,
    objective,
    ranks_of,
    score,
)


def random_space(seed, granularity="layer"):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    candidates = [(0, 4, 8), (2, 4, 6, 8, 10, 12), (0, 1, 2, 4, 16), (8,), (3, 5, 32)][seed % 5]
    layers = sorted(rng.choice(n, int(rng.integers(1, n + 1)), replace=False).tolist())
    fixed = [i for i in range(n) if i not in layers]
    n_ranks = len(layers) * (1 if granularity == "layer" else 2)
    costs = rng.integers(1, 9999, n_ranks) if seed % 3 else rng.random(n_ranks) + 0.01
    low, high = candidates[0] * sum(costs), candidates[-1] * sum(costs)
    fixed_cost = float(rng.integers(9999)) if fixed else 0.0
    budget = fixed_cost + low + (high - low) * rng.random() ** 2
    return RankSpace(
        n,
        candidates,
        budget if budget > 0 else None,
        layers=layers,
        costs=costs,
        fixed_ranks=dict.fromkeys(fixed, 8),
        fixed_cost=fixed_cost,
        profile=rng.random(n_ranks),
        granularity=granularity,
    )


def test_the_budget_holds_for_every_proposal_and_uniform_comes_first(fuzz_seed):
    space = random_space(fuzz_seed, "sublayer" if fuzz_seed % 4 == 3 else "layer")
    study = new_study(space, seed=fuzz_seed)
    rng = np.random.default_rng(fuzz_seed)
    weights = dict(zip(space.modules, rng.random(len(space.modules)), strict=True))

    def noisy(trial):
        ranks = space.suggest(trial)
        return float(sum(weights[m] * np.log2(1 + r) for m, r in ranks.items()) + 0.1 * rng.standard_normal())

    study.optimize(noisy, n_trials=10)
    assert is_uniform(study.trials[0], space)
    assert all(space.is_feasible(ranks_of(t, space)) for t in study.trials)
    assert not any(broken_constraints(study))


@pytest.mark.parametrize("candidates", [(2, 4, 6, 8, 10, 12), (0, 4, 8, 16, 32)])
def test_where_only_the_mlps_ranks_matter_the_budget_goes_there(candidates):
    space = RankSpace(10, candidates, "uniform:8", costs=[1, 2] * 10, granularity="sublayer")

    def gain(ranks):
        return float(sum((2 + i % 3) * np.log2(1 + ranks[m]) for i, m in enumerate(space.modules[1::2])))

    study = new_study(space)
    study.optimize(lambda trial: gain(space.suggest(trial)), n_trials=25)
    found = recommend(study).ranks
    attention, mlp = ([found[m] for m in space.modules[part]] for part in space.series.values())
    assert np.mean(attention) < candidates[0] + 2 < 8
    assert np.mean(mlp) > 10
    assert gain(found) > 1.08 * gain(space.uniform())


@pytest.mark.parametrize("cost", [0.1, 0.3, 1 / 3, 1.1])
def test_a_budget_in_fractions_is_not_exceeded_by_a_rounding_error(cost):
    space = RankSpace(9, budget="uniform:8", costs=[cost] * 9, fixed_cost=0.7)
    study = new_study(space)
    study.optimize(lambda trial: float(score(space.suggest(trial))), n_trials=12)
    assert broken_constraints(study) == [{}] * 12


def test_partly_enqueued_ranks_are_kept_and_the_others_make_room_for_them():
    study = new_study()
    study.optimize(objective, n_trials=3)
    given = [{"layer_00_rank": 12, "layer_03_rank": 12, "layer_04_rank": 12}, {"layer_07_rank": 2}]
    for ranks in given:
        study.enqueue_trial(ranks)
    study.optimize(objective, n_trials=2)
    for trial, ranks in zip(study.trials[3:], given, strict=True):
        assert ranks.items() <= trial.params.items()
        assert SPACE.is_feasible(ranks_of(trial))


def test_a_partly_enqueued_first_trial_keeps_its_ranks_and_the_budget():
    study = new_study()
    study.enqueue_trial({"layer_05_rank": 12})
    study.optimize(objective, n_trials=2)
    assert study.trials[0].params["layer_05_rank"] == 12
    assert SPACE.is_feasible(ranks_of(study.trials[0]))
    assert is_uniform(study.trials[1])


def test_enqueued_ranks_that_no_budget_can_save_get_the_cheapest_rest():
    study = new_study()
    study.enqueue_trial({SPACE.name(layer): 12 for layer in range(6)})
    study.optimize(objective, n_trials=1)
    assert [*ranks_of(study.trials[0]).values()] == [12] * 6 + [2] * 2
    assert not HAS_SET_CONSTRAINT or study.trials[0].constraints["rankadaptor:budget"] > 0


def test_a_fully_enqueued_trial_is_run_as_it_is():
    study = new_study()
    study.optimize(objective, n_trials=2)
    given = {SPACE.name(layer): 12 for layer in SPACE.layers}
    study.enqueue_trial(given)
    study.optimize(objective, n_trials=2)
    assert study.trials[2].params == given
    assert SPACE.is_feasible(ranks_of(study.trials[3]))


def test_ranks_missing_from_the_search_space_count_at_their_largest():
    study = new_study()
    study.optimize(objective, n_trials=3)
    missing = {SPACE.name(layer): 12 for layer in (1, 6)}
    asked = {name: dist for name, dist in SPACE.distributions().items() if name not in missing}
    trial = study._storage.get_trial(study.ask()._trial_id)
    params = study.sampler.sample_relative(study, trial, asked)
    assert params.keys() == asked.keys()
    assert SPACE.is_within_budget(SPACE.cost(SPACE.to_ranks(params | missing)))
    assert not SPACE.is_within_budget(SPACE.cost(SPACE.to_ranks(params | missing)) + 2 * min(SPACE.costs))


@pytest.mark.parametrize("fixed", [2, 12])
def test_with_parameters_fixed_by_optuna_the_budget_still_holds(fixed):
    study = new_study()
    study.optimize(objective, n_trials=3)
    study.sampler = PartialFixedSampler({"layer_00_rank": fixed, "layer_05_rank": fixed}, study.sampler)
    study.optimize(objective, n_trials=8)
    for trial in study.trials[3:]:
        assert (trial.params["layer_00_rank"], trial.params["layer_05_rank"]) == (fixed, fixed)
        assert SPACE.is_feasible(ranks_of(trial))
    assert max(SPACE.cost(ranks_of(trial)) for trial in study.trials[3:]) > 0.95 * SPACE.budget
