from __future__ import annotations

import logging

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, StopWhenConverged, recommend
from rankadaptor_optuna.database.attributes import CONVERGED_ATTR
from rankadaptor_optuna.studies import convergence
from rankadaptor_optuna.studies.convergence import remaining_gain
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.surrogate.allocations import Allocations
from rankadaptor_optuna.surrogate.grid import RankGrid

SPACE = RankSpace(8, budget="uniform:8", costs=[100, 110, 120, 130, 120, 110, 100, 90])
ROWS = np.arange(8)


class World:
    """Layers that need rank more or less, and scores with noise half as large as random allocations' spread."""

    def __init__(self, seed, noise=0.5):
        rng = np.random.default_rng(seed)
        depth = np.linspace(0, 1, 8)
        need = np.exp(0.8 * rng.standard_normal() * np.cos(np.pi * depth) + 0.3 * rng.standard_normal(8))
        self.table = need[:, None] * np.log2(1 + np.asarray(SPACE.candidates))
        allocations = Allocations.of(RankGrid.from_space(SPACE), SPACE.budget)
        others = [self.table[ROWS, allocations.best(rng.standard_normal((8, 6)))].sum() for _ in range(50)]
        self.spread = np.std(others)
        self.best = self.table[ROWS, allocations.best(self.table)].sum()
        self.noise, self.rng = noise * self.spread, rng
        self.study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(SPACE, prior=None, seed=seed))

    def value(self, ranks):
        return self.table[ROWS, [SPACE.candidates.index(rank) for rank in ranks.values()]].sum()

    def __call__(self, trial):
        return float(self.value(SPACE.suggest(trial)) + self.noise * self.rng.standard_normal())

    def regret(self):
        """In units of random allocations' spread."""
        return (self.best - self.value(recommend(self.study).ranks)) / self.spread


def test_it_stops_neither_at_once_nor_never_and_misses_little():
    stopped, regrets, later = [], [], []
    for seed in range(3):
        world = World(seed)
        world.study.optimize(world, n_trials=70, callbacks=[StopWhenConverged(min_trials=10)])
        stopped.append(len(world.study.trials))
        regrets.append(world.regret())
        world.study.optimize(world, n_trials=70 - stopped[-1])
        later.append(world.regret())
    assert min(stopped) > 12
    assert max(stopped) < 70
    assert np.mean(regrets) < np.mean(later) + 0.2


def converging(n_trials=60, **settings):
    world = World(0)
    world.study.optimize(world, n_trials=n_trials, callbacks=[StopWhenConverged(min_trials=10, **settings)])
    return world


def test_it_says_so_in_the_log_and_with_the_study():
    heard, verbosity = [], optuna.logging.get_verbosity()
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logging.getLogger("optuna").addHandler(handler)
    try:
        study = converging().study
    finally:
        logging.getLogger("optuna").removeHandler(handler)
        optuna.logging.set_verbosity(verbosity)
    statement = study.user_attrs[CONVERGED_ATTR]
    assert statement.startswith(f"Converged after {len(study.trials)} trials: the expected remaining gain, 0.")
    assert "0.5 times a score's noise" in statement
    assert statement in heard


def test_it_never_stops_before_20_trials_unless_told_so():
    world = World(0)
    world.study.optimize(world, n_trials=30, callbacks=[StopWhenConverged(tolerance=1e9)])
    assert len(world.study.trials) == 20
    assert len(converging(tolerance=1e9).study.trials) == 10


@pytest.mark.parametrize(("patience", "counts"), [(1, [10]), (3, [8, 9, 10]), (20, [*range(1, 11)])])
def test_the_gain_is_small_after_each_of_the_latest_trials(patience, counts, monkeypatch):
    asked = []
    monkeypatch.setattr(convergence, "remaining_gain", lambda fitted, n, n_draws: asked.append(n) or 0.0)
    assert len(converging(patience=patience).study.trials) == 10
    assert asked == counts


def test_a_study_that_goes_on_says_nothing():
    assert CONVERGED_ATTR not in converging(9).study.user_attrs


def test_another_worker_decides_the_same_from_the_same_trials():
    study = converging().study
    n = len(study.trials)
    for kept in (n - 1, n):
        other = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(SPACE, prior=None, seed=7))
        other.add_trials(study.trials[:kept])
        stopped = []
        other.stop = lambda stopped=stopped: stopped.append(True)
        StopWhenConverged(min_trials=10)(other, other.trials[-1])
        assert bool(stopped) is (kept == n)


def test_the_less_gain_is_tolerated_the_later_it_stops():
    assert len(converging(tolerance=1.0).study.trials) < len(converging(tolerance=0.5).study.trials)


def test_the_remaining_gain_shrinks_as_trials_come_in():
    worlds = [World(seed) for seed in range(4)]
    for world in worlds:
        world.study.optimize(world, n_trials=40)
    found = [FittedStudy(StudyReading(world.study)) for world in worlds]
    gains = [sum(remaining_gain(each, n, 32) for each in found) for n in (5, 15, 40)]
    assert gains[0] > gains[1] > gains[2] > 0


def test_another_parameter_that_is_not_settled_adds_to_the_remaining_gain():
    def gain(seed, with_rate):
        def objective(trial):
            value = sum(SPACE.suggest(trial).values())
            return float(value + (trial.suggest_float("rate", 0, 1) if with_rate else 0.5))

        study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=seed))
        study.optimize(objective, n_trials=12)
        return remaining_gain(FittedStudy(StudyReading(study, SPACE), None), 12, 32)

    without, beside = (sum(gain(seed, with_rate) for seed in range(4)) for with_rate in (False, True))
    assert beside > 1.1 * without


def test_verification_trials_are_let_through():
    world = converging()
    n = len(world.study.trials)
    recommend(world.study, verify=1, seeds=2)
    world.study.optimize(world, n_trials=4, callbacks=[StopWhenConverged(min_trials=10)])
    assert len(world.study.trials) == n + 4


def test_failed_trials_do_not_stop_the_study():
    world = World(0)
    world.study.optimize(lambda trial: float("nan"), n_trials=2, callbacks=[StopWhenConverged(min_trials=1)])
    assert len(world.study.trials) == 2


@pytest.mark.parametrize(
    ("study", "objective", "message"),
    [
        (optuna.create_study(directions=["minimize"] * 2), lambda trial: (0.0, 0.0), "one objective, this study has 2"),
    ],
)
def test_a_study_that_it_cannot_judge_is_refused_at_the_first_trial(study, objective, message):
    with pytest.raises(ValueError, match=message):
        study.optimize(objective, n_trials=1, callbacks=[StopWhenConverged()])


@pytest.mark.parametrize("name", ["min_trials", "patience", "n_draws", "tolerance"])
def test_an_argument_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        StopWhenConverged(**{name: 0})


def test_trials_before_the_first_with_ranks_do_not_end_the_study(caplog):
    def objective(trial):
        if trial.suggest_categorical("method", ["full", "lora"]) == "full":
            return 0.0
        return float(sum(trial.suggest_int(f"r_{i}", 2, 16) for i in range(4)))

    study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0))
    for _ in range(2):
        study.enqueue_trial({"method": "full"})
    study.optimize(objective, n_trials=4, callbacks=[StopWhenConverged()])
    assert len(study.trials) == 4
    assert sum("does not stop the study yet" in record.getMessage() for record in caplog.records) == 1
