"""RankAdaptorSampler beyond Optuna's contract, which test_conformance.py has."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler

from rankadaptor_optuna import PerformanceModel, RankAdaptorSampler, RankSpace
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from tests.sampling.common import RANK, SENSITIVITY, SPACE, is_uniform, new_study, objective, ranks_of, score


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_first_trial_is_uniform_and_no_other_is(direction):
    study = new_study(direction=direction)
    study.optimize(objective, n_trials=6)
    assert [is_uniform(t) for t in study.trials] == [True] + [False] * 5


def test_the_uniform_configuration_comes_second_where_others_were_enqueued():
    study = new_study()
    study.enqueue_trial({SPACE.name(layer): 2 for layer in SPACE.layers})
    study.optimize(objective, n_trials=3)
    assert [is_uniform(t) for t in study.trials] == [False, True, False]


def test_an_enqueued_uniform_trial_is_the_reference():
    study = new_study()
    study.enqueue_trial({SPACE.name(layer): rank for layer, rank in SPACE.uniform().items()})
    study.optimize(objective, n_trials=3)
    assert [is_uniform(t) for t in study.trials] == [True, False, False]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_finds_better_than_uniform_at_the_same_budget(direction):
    sign = 1 if direction == "maximize" else -1
    study = new_study(direction=direction)
    study.optimize(lambda trial: sign * objective(trial), n_trials=20)
    scores = [sign * t.value for t in study.trials]
    assert max(scores) > scores[0] + 1
    assert np.mean(scores[10:]) > scores[0]


def test_minimise_mirrors_maximise():
    up, down = new_study(), new_study(direction="minimize")
    up.optimize(objective, n_trials=6)
    down.optimize(lambda trial: -objective(trial), n_trials=6)
    assert [t.params for t in up.trials] == [t.params for t in down.trials]


def test_another_seed_makes_other_proposals_after_the_uniform_one():
    studies = [new_study(seed=seed) for seed in (0, 1)]
    for study in studies:
        study.optimize(objective, n_trials=4)
    assert studies[0].trials[0].params == studies[1].trials[0].params
    assert all(studies[0].trials[i].params != studies[1].trials[i].params for i in (1, 2, 3))


def test_without_a_seed_two_samplers_differ():
    studies = [new_study(seed=None) for _ in range(2)]
    for study in studies:
        study.optimize(objective, n_trials=3)
    assert studies[0].trials[2].params != studies[1].trials[2].params


def test_of_several_draws_the_one_least_known_at_its_optimum_is_proposed(monkeypatch):
    known = new_study()
    known.optimize(objective, n_trials=8)
    model = PerformanceModel(SPACE, prior=None)
    model.update([list(ranks_of(t).values()) for t in known.trials], [t.value for t in known.trials])

    def uncertainty(n_draws):
        monkeypatch.setattr("rankadaptor_optuna.sampling.sampler._N_DRAWS", n_draws)
        found = []
        for seed in range(12):
            study = new_study(seed=seed)
            study.add_trials(known.trials)
            found.append(model.predict_gain(list(SPACE.suggest(study.ask()).values()))[1][0])
        return sum(found)

    assert uncertainty(8) > 1.05 * uncertainty(1)


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_copied_sampler_proposes_the_same(copied):
    study = new_study()
    study.optimize(objective, n_trials=3)
    again = optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=copied(study.sampler))
    proposed = SPACE.suggest(again.ask())
    unbroken = new_study()
    unbroken.optimize(objective, n_trials=4)
    assert proposed == ranks_of(unbroken.trials[3])


def test_a_pickled_sampler_carries_no_trials():
    study = new_study()
    before = pickle.dumps(study.sampler)
    study.optimize(objective, n_trials=3)
    assert pickle.dumps(study.sampler) == before


def test_one_sampler_serves_two_studies_in_turn():
    other_space = RankSpace(8, (2, 16, 32))
    alone = [optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(prior=None, seed=0)) for _ in "ab"]
    shared = RankAdaptorSampler(prior=None, seed=0)
    in_turn = [optuna.create_study(direction="maximize", sampler=shared) for _ in "ab"]
    for studies in (alone, in_turn):
        for _ in range(4):
            studies[0].optimize(objective, n_trials=2)
            studies[1].optimize(lambda trial: -float(score(other_space.suggest(trial))), n_trials=1)
    for one, other in zip(alone, in_turn, strict=True):
        assert [t.params for t in one.trials] == [t.params for t in other.trials]


def test_the_space_is_stored_with_the_study():
    study = new_study()
    study.ask()
    assert RankSpace.from_dict(study.user_attrs["rankadaptor:space"]) == SPACE


def test_the_independent_sampler_samples_what_is_outside_the_relative_space():
    sampler = RankAdaptorSampler(prior=None, seed=0, independent_sampler=RandomSampler(seed=5))
    study = optuna.create_study(sampler=sampler)
    value = study.ask().suggest_float("x", 0, 1)
    assert value == optuna.create_study(sampler=RandomSampler(seed=5)).ask().suggest_float("x", 0, 1)


def test_the_shipped_prior_is_used_unless_switched_off():
    def second(prior):
        study = new_study(prior=prior)
        study.optimize(objective, n_trials=5)
        return [t.params for t in study.trials]

    assert second("pretrained") != second(None)


@pytest.mark.parametrize("n_startup_trials", [0, 4])
def test_scores_count_from_the_first_proposal_after_the_startup_trials(n_startup_trials):
    studies = []
    for sign in (1, -1):
        sampler = RankAdaptorSampler(SPACE, prior=None, seed=0, n_startup_trials=n_startup_trials)
        studies.append(optuna.create_study(direction="maximize", sampler=sampler))
        studies[-1].optimize(lambda trial, sign=sign: sign * objective(trial), n_trials=6)
    same = [a.params == b.params for a, b in zip(*(study.trials for study in studies), strict=True)]
    # two scores are needed to tell one sign from the other
    assert same == [i < max(2, n_startup_trials) for i in range(6)]


def test_a_negative_number_of_startup_trials_is_refused():
    with pytest.raises(ValueError, match="n_startup_trials must be at least 0, got -1"):
        RankAdaptorSampler(n_startup_trials=-1)


def test_a_prior_that_cannot_be_read_is_refused_at_once():
    with pytest.raises(ValueError, match="cannot read the prior 'nowhere'"):
        RankAdaptorSampler(prior="nowhere")


def test_proposals_follow_the_layers_sensitivities_from_the_second_on():
    told, others = [], []
    for seed in range(8):
        study = new_study(seed=seed)
        first = study.ask()
        study.set_user_attr(SENSITIVITY_ATTR, SENSITIVITY)
        study.tell(first, objective(first))
        assert is_uniform(study.trials[0])
        ranks = SPACE.suggest(study.ask())
        told += [ranks[2], ranks[5]]
        others += [rank for layer, rank in ranks.items() if layer not in (2, 5)]
        assert SPACE.is_feasible(ranks)
    assert np.mean(told) > np.mean(others) + 2


def test_what_a_sampler_proposes_rests_on_the_stored_sensitivities_whichever_process_asks():
    proposals = []
    for known in (SENSITIVITY, SENSITIVITY, {}):
        study = new_study()
        study.optimize(objective, n_trials=3)
        study.set_user_attr(SENSITIVITY_ATTR, known)
        if len(proposals) == 1:
            study.sampler = RankAdaptorSampler(SPACE, prior=None, seed=0)  # has not seen the trials before
        proposals.append(SPACE.suggest(study.ask()))
    assert proposals[0] == proposals[1] != proposals[2]


class Wrapping(optuna.samplers.BaseSampler):
    """Another's sampler that proposes what RankAdaptorSampler does, and tells it of nothing else."""

    def __init__(self, sampler):
        self.infer_relative_search_space = sampler.infer_relative_search_space
        self.sample_relative, self.sample_independent = sampler.sample_relative, sampler.sample_independent

    def infer_relative_search_space(self, study, trial): ...

    def sample_relative(self, study, trial, search_space): ...

    def sample_independent(self, study, trial, param_name, param_distribution): ...


def test_a_sampler_that_tells_it_of_no_trials_gets_the_same_proposals():
    plain, wrapped = new_study(prior="pretrained"), new_study(prior="pretrained")
    wrapped.sampler = Wrapping(wrapped.sampler)
    for study in (plain, wrapped):
        study.optimize(objective, n_trials=4)
    assert [t.params for t in wrapped.trials] == [t.params for t in plain.trials]


def test_the_spaces_budget_does_not_bind_other_ranks():
    study = new_study(RankSpace(3, budget=6))
    asked = {f"r_{i}": RANK for i in range(4)}
    trial = study._storage.get_trial(study.ask()._trial_id)
    assert sum(study.sampler.sample_relative(study, trial, asked).values()) > 8
