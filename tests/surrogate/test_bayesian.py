from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.features import MLP, feature_groups
from rankadaptor_optuna.surrogate.grid import RankGrid
from rankadaptor_optuna.surrogate.prior import Prior

SPACE = RankSpace(10, budget="uniform:8", profile=np.linspace(0.1, 0.5, 10) ** 2)
WEIGHTS = np.linspace(0.2, 2, 10)  # deeper layers need rank more


def score(ranks):
    return 0.3 * (WEIGHTS * np.log2(1 + np.asarray(ranks))).sum(-1)


def configurations(n, seed=0):
    return np.random.default_rng(seed).choice(SPACE.candidates, (n, 10)).astype(float)


def fitted(n=40, *, scores=None, **settings):
    model = BayesianModel(SPACE, **{"prior": None} | settings)
    ranks = configurations(n)
    model.update(ranks, score(ranks) if scores is None else scores)
    return model


@pytest.fixture
def prior():
    rng = np.random.default_rng(0)
    mlp = MLP([rng.standard_normal(s) for s in ((3, 8), (8, 8), (8, 6))], [np.zeros(8), np.zeros(8), np.zeros(6)])
    return Prior(mlp, rng.standard_normal(6), np.full(6, 0.5))


@pytest.mark.parametrize("with_prior", [False, True])
def test_an_update_in_two_steps_equals_one(prior, with_prior):
    used = prior if with_prior else None
    once, twice = fitted(prior=used), BayesianModel(SPACE, prior=used)
    ranks, test = configurations(40), configurations(5, seed=1)
    twice.update(ranks[:15], score(ranks[:15]))
    twice.predict(test)  # whatever was computed by now must not linger
    twice.update(ranks[15:39], score(ranks[15:39]))
    twice.update(ranks[39], score(ranks[39]))
    for a, b in zip(once.predict(test), twice.predict(test), strict=True):
        assert a == pytest.approx(b)
    assert once.mean().table == pytest.approx(twice.mean().table)


def test_a_known_additive_function_is_recovered():
    test = configurations(50, seed=1)
    mean, std = fitted(80).predict(test)
    assert np.abs(mean - score(test)).mean() < 0.1 * score(test).std()
    assert (np.abs(mean - score(test)) < 4 * std).all()


def test_attention_and_mlp_may_need_rank_at_different_depths():
    space = RankSpace(10, granularity="sublayer")
    depth = np.linspace(0, 1, 10)
    weights = np.stack([2 - 1.8 * depth, 0.2 + 1.8 * depth], axis=1).ravel()
    rng = np.random.default_rng(0)
    ranks, test = rng.choice(space.candidates, (2, 20, 20)).astype(float)
    both = BayesianModel(space, prior=None)
    one = BayesianModel(replace(both.grid, series=np.zeros(20, dtype=int)), prior=None)
    errors = []
    for model in (both, one):
        model.update(ranks, np.log2(1 + ranks) @ weights)
        errors.append(np.abs(model.predict(test)[0] - np.log2(1 + test) @ weights).mean())
    assert errors[0] < 0.5 * errors[1]


def test_an_effect_of_attention_ranks_is_expected_of_mlp_ranks_by_a_third():
    space, depth = RankSpace(10, granularity="sublayer"), np.linspace(0, 1, 10)
    ranks = np.full((40, 20), 8.0)
    ranks[:, ::2] = np.random.default_rng(0).choice(space.candidates, (40, 10))  # attention's alone vary
    model = BayesianModel(space, prior=None)
    model.update(ranks, np.log2(1 + ranks[:, ::2]) @ (depth - 0.5))
    table = model.mean().table
    worth = table[:, -1] - table[:, 0]
    attention, mlp = (np.polyfit(depth, part, 1)[0] for part in (worth[::2], worth[1::2]))
    assert mlp / attention == pytest.approx(1 / 3, abs=0.1)


def test_more_trials_make_the_prediction_surer():
    test = configurations(20, seed=1)
    assert fitted(80).predict(test)[1].mean() < 0.7 * fitted(15).predict(test)[1].mean()


def test_before_any_trial_more_rank_is_expected_to_help():
    model = BayesianModel(SPACE, prior=None)
    mean, std = model.predict([[2.0] * 10, [8.0] * 10, [12.0] * 10])
    assert mean[0] < mean[1] < mean[2]
    assert (std > 0).all()


def test_predictions_are_in_the_scores_units():
    test, ranks, variance = configurations(5, seed=1), configurations(40), np.arange(40) / 40
    model, other = (BayesianModel(SPACE, prior=None) for _ in range(2))
    model.update(ranks, score(ranks), variance=variance)
    other.update(ranks, 1000 * score(ranks) + 7, variance=1000**2 * variance)
    (mean, std), shifted = model.predict(test), other.predict(test)
    assert shifted[0] == pytest.approx(1000 * mean + 7)
    assert shifted[1] == pytest.approx(1000 * std)


def test_minimise_mirrors_maximise(prior):
    ranks, test = configurations(40), configurations(5, seed=1)
    up, down = fitted(prior=prior), fitted(prior=prior, direction="minimize", scores=-score(ranks))
    assert down.predict(test)[0] == pytest.approx(-up.predict(test)[0])
    assert down.predict(test)[1] == pytest.approx(up.predict(test)[1])
    assert down.mean().table == pytest.approx(up.mean().table)
    for a, b in zip(down.predict_gain(test), up.predict_gain(test), strict=True):
        assert a == pytest.approx(b)


def test_a_diverged_score_does_not_move_the_recommendation():
    ranks, scores = configurations(40), score(configurations(40))
    scores[7] = -1e6
    calm, shaken = fitted().mean().table, fitted(scores=scores).mean().table
    assert (calm.argmax(1) == shaken.argmax(1)).all()
    gain, shaken_gain = calm[:, -1] - calm[:, 0], shaken[:, -1] - shaken[:, 0]
    assert np.corrcoef(gain, shaken_gain)[0, 1] > 0.9
    assert fitted(scores=scores).predict(ranks)[0] == pytest.approx(score(ranks), abs=2 * score(ranks).std())


def test_trials_far_below_the_rest_do_not_bend_the_model_where_it_is_right():
    ranks, test = configurations(30), configurations(50, seed=1)
    poor = np.where(np.eye(10, dtype=bool)[:4], max(SPACE.candidates), min(SPACE.candidates))
    collapsed = np.full(4, score(ranks).min() - 10 * score(ranks).std())  # by far more than a sum over layers explains
    model = BayesianModel(SPACE, prior=None)
    model.update(np.concatenate([ranks, poor]), np.concatenate([score(ranks), collapsed]))
    assert np.corrcoef(model.predict(test)[0], score(test))[0, 1] > 0.96  # 0.93 if all count alike


def test_the_gain_is_the_difference_of_predictions_and_surer_than_both():
    model, test = fitted(20), configurations(5, seed=1)
    gain, std = model.predict_gain(test)
    mean, spread = model.predict(test)
    assert gain == pytest.approx(mean - model.predict([8.0] * 10)[0])
    assert (std < spread + model.predict([8.0] * 10)[1]).all()
    assert model.predict_gain([8.0] * 10)[0] == pytest.approx(0)
    assert model.predict_gain([8.0] * 10)[1] == pytest.approx(0)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_lasting_gain_is_smaller_and_stays_uncertain_after_many_trials(direction):
    ranks = configurations(200)
    model = BayesianModel(SPACE, prior=None, direction=direction)
    model.update(ranks, score(ranks) if direction == "maximize" else -score(ranks))
    best = ranks[score(ranks).argsort()[-5:]]
    gain, std = model.predict_gain(best)
    lasting, spread = model.predict_lasting_gain(best)
    assert (lasting > 0).all()
    assert (lasting < gain).all()
    assert (spread > 3 * std).all()
    assert np.ravel(model.predict_lasting_gain([8.0] * 10)).tolist() == [0, 0]


def test_a_quarter_of_what_was_learned_of_a_gain_is_not_expected_to_last():
    model = fitted(20)
    test = np.stack([np.random.default_rng(seed).permutation([4.0] * 5 + [12.0] * 5) for seed in range(10)])
    gain, lasting = model.predict_gain(test)[0], model.predict_lasting_gain(test)[0]
    # between configurations of equal total rank, of which nothing was expected before any trial
    assert np.ptp(gain) > 0.5
    assert lasting - lasting[0] == pytest.approx(0.75 * (gain - gain[0]))


def test_without_ranks_the_belief_agrees_with_predict():
    nothing, points = np.zeros(0), np.linspace(0, 1, 12)[:, None]
    model = BayesianModel(RankGrid(nothing, [], nothing, nothing, nothing), prior=None, n_ordinary=1)
    scores = 5 - (points[:, 0] - 0.3) ** 2
    model.update(np.zeros((12, 0)), scores, points)
    belief = model.mean()
    values = scores.mean() + model.spread * (belief.offset + belief.of_ordinary(points))
    assert values == pytest.approx(model.predict(np.zeros((12, 0)), points)[0])


def test_the_beliefs_table_agrees_with_predict_at_the_total_rank_of_the_best_trial():
    model, tried = fitted(), configurations(40)
    best = tried[score(tried).argmax()]
    test = np.stack([np.random.default_rng(i).permutation(best) for i in range(20)])
    columns = np.searchsorted(SPACE.candidates, test)
    belief = model.mean()
    values = belief.offset + belief.table[np.arange(10), columns].sum(1)
    mean = model.predict(test)[0]
    assert values * model.spread + score(tried).mean() == pytest.approx(mean)


def test_an_effect_of_the_total_rank_alone_is_learned():
    def of_total(ranks):
        return -((np.log2(1 + ranks).sum(1) - 32) ** 2)

    test = configurations(50, seed=1)
    mean, _ = fitted(80, scores=of_total(configurations(80))).predict(test)
    assert np.corrcoef(mean, of_total(test))[0, 1] > 0.98


def test_thompson_draws_differ_by_seed_and_centre_on_the_mean():
    model = fitted(15)
    draws = np.stack([model.sample(np.random.default_rng(i)).table for i in range(300)])
    assert (draws[0] == model.sample(np.random.default_rng(0)).table).all()
    assert (draws[0] != draws[1]).any()
    assert np.abs(draws.mean(0) - model.mean().table).max() < 0.3 * draws.std(0).max()


def test_equal_scores_are_no_error():
    mean, std = fitted(scores=np.full(40, 3.0)).predict(configurations(5, seed=1))
    assert mean == pytest.approx(np.full(5, 3.0), abs=1)
    assert np.isfinite(std).all()


def test_one_trial_is_enough_to_predict():
    model = BayesianModel(SPACE, prior=None)
    model.update([8.0] * 10, 0.5)
    assert np.isfinite(model.predict([[2.0] * 10])).all()


def test_a_misleading_prior_fades_out_as_trials_come_in(prior):
    misleading = Prior(prior.mlp, 5 * prior.mean, 1e-3 * prior.std)
    test = configurations(50, seed=1)

    def correlation(n, used):
        return np.corrcoef(fitted(n, prior=used).predict(test)[0], score(test))[0, 1]

    assert correlation(60, misleading) > correlation(60, None) - 0.02


def test_before_any_trial_a_prior_is_believed_by_a_sixth_on_the_scale_of_the_signal(prior):
    test = configurations(20)
    with_prior, without = BayesianModel(SPACE, prior=prior), BayesianModel(SPACE, prior=None)
    columns = feature_groups(with_prior.grid, prior.mlp)["mlp"]
    says = with_prior.encode(test)[:, 1:][:, columns] @ prior.mean
    moved = with_prior.predict(test)[0] - without.predict(test)[0]
    assert np.abs(says).max() > 1
    signals = [0.25, 0.5, 1, 2, 4, 8]  # as likely one as the other, and learned at 0.5
    assert moved == pytest.approx(np.mean(signals) / 0.5 * says / 6, rel=0.02)


def test_ordinary_parameters_are_learned_beside_the_ranks():
    rng = np.random.default_rng(0)
    model = BayesianModel(SPACE, prior=None, n_ordinary=2)
    ranks, points = configurations(60), rng.random((60, 2))
    model.update(ranks, score(ranks) - 40 * (points[:, 0] - 0.3) ** 2, points)
    grid = np.asarray([[x, 0.5] for x in np.linspace(0, 1, 21)])
    assert grid[model.mean().of_ordinary(grid).argmax(), 0] == pytest.approx(0.3, abs=0.1)
    assert model.mean().table[9, -1] > model.mean().table[0, -1]


def test_a_refused_update_changes_nothing():
    model, test = fitted(), configurations(5, seed=1)
    before = model.predict(test)[0]
    with pytest.raises(ValueError, match="finite"):
        model.update([[2.0] * 10], [float("inf")])
    assert (model.predict(test)[0] == before).all()


def test_the_noise_is_that_of_the_scores_in_their_units():
    ranks, rng = configurations(100), np.random.default_rng(5)
    for sd in (1.0, 3.0):
        model = fitted(100, scores=50 + score(ranks) + sd * rng.standard_normal(100))
        assert model.noise == pytest.approx(sd, rel=0.35)


def test_differences_of_scores_are_learned_from_whatever_offset_they_had():
    model, test = fitted(15), configurations(30, seed=1)
    rows, other = model.encode(configurations(40, seed=2)), score(configurations(40, seed=2)) + 1000
    contrast = np.linalg.qr(np.eye(40) - 1 / 40)[0][:, :-1].T
    both = BayesianModel(SPACE, prior=None)
    before = score(configurations(15))
    both.fit(np.concatenate([model.features, contrast @ rows]), np.concatenate([before, contrast @ other]))
    off, off_both = (np.abs(m.predict(test)[0] - score(test)).mean() for m in (model, both))
    assert off_both < 0.6 * off


def test_the_gain_over_uniform_is_a_difference_of_configurations():
    model, test = fitted(), configurations(5, seed=1)
    same = model.predict_difference(model.encode(test), model.encode([8.0] * 10))
    assert np.asarray(same) == pytest.approx(np.asarray(model.predict_gain(test)))


def test_a_lower_bound_is_half_a_standard_deviation_below_the_gain_and_its_belief_touches_it():
    model, best = fitted(20), configurations(20)[score(configurations(20)).argmax()]
    test = np.stack([np.random.default_rng(i).permutation(best) for i in range(20)])  # where a belief is linear
    columns = np.searchsorted(SPACE.candidates, test)
    rows = model.encode(test)
    bounds = [model.lower_bound(row - rows[0]) for row in rows]
    gain, std = model.predict_difference(rows, rows[:1])
    assert model.spread * np.asarray([b for b, _ in bounds]) == pytest.approx(gain - 0.5 * std)
    for own, (bound, belief) in enumerate(bounds):
        totals = belief.table[np.arange(10), columns].sum(1)
        over_first = totals - totals[0]
        assert over_first[own] == pytest.approx(bound)
        assert (over_first > np.asarray([b for b, _ in bounds]) - 1e-9).all()


def test_a_constraints_mean_does_not_depend_on_its_unit():
    model, ranks = fitted(), configurations(20)
    limit = ranks.sum(1) - 70
    a, b = (model.constraint(model.encode_with_cost(ranks), unit * limit) for unit in (1, 1000))
    assert a.table == pytest.approx(b.table)
    assert a.offset == pytest.approx(b.offset)


def test_a_constraints_mean_has_its_sign():
    model, ranks, test = fitted(), configurations(60), configurations(50, seed=1)
    limit = ranks.sum(1) - 70
    mean = model.constraint(model.encode_with_cost(ranks), limit)
    values = mean.offset + mean.table[np.arange(10), np.searchsorted(SPACE.candidates, test)].sum(1)
    assert np.mean((values > 0) == (test.sum(1) > 70)) > 0.9


def sensitive_model():
    """Returns a model of layers whose sensitivities differ."""
    sensitivity = np.asarray([1.0, 1, 1, 5, 1, 1, 1, 1, 3, 1])
    return BayesianModel(replace(RankGrid.from_space(SPACE), sensitivity=sensitivity), prior=None)


def test_sensitivities_are_believed_before_any_trial():
    model = sensitive_model()
    draws = np.stack([model.sample(np.random.default_rng(seed)).table for seed in range(200)])
    worth = draws[:, :, -1] - draws[:, :, 0]
    assert np.mean(worth[:, 3] > worth[:, 4]) > 0.95


def test_ten_trials_refute_misleading_sensitivities():
    def truth(ranks):
        return np.log2(1 + ranks) @ (1 / sensitive_model().grid.sensitivity)

    found, test = [], configurations(200, seed=99)
    for seed in range(5):
        model, ranks = sensitive_model(), configurations(10, seed)
        model.update(ranks, truth(ranks) + 0.2 * np.random.default_rng(seed).standard_normal(10))
        found.append(np.corrcoef(model.predict(test)[0], truth(test))[0, 1])
    assert np.mean(found) > 0.85


@pytest.mark.parametrize("with_prior", [False, True])
def test_rank_is_expected_to_be_worth_most_where_the_loss_is_sensitive(with_prior, prior):
    sensitivity = np.asarray([1.0, 1, 1, 5, 1, 1, 1, 1, 3, 1])
    grid = replace(RankGrid.from_space(SPACE), sensitivity=sensitivity)
    table = BayesianModel(grid, prior=None).mean().table
    worth = table[:, -1] - table[:, 0]
    assert worth.argsort()[::-1][:2].tolist() == [3, 8]
    assert (worth > 0).all()
    used = prior if with_prior else None
    model = BayesianModel(grid, prior=used)
    ranks = configurations(60)
    model.update(ranks, -score(ranks))  # the data says otherwise: less rank is better, most of all in late layers
    table = model.mean().table
    assert (table[:, -1] - table[:, 0]).argmin() > 6
