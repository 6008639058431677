"""Studies to show, filled without a sampler's work."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.views.study_view import StudyView

SPACE = RankSpace(
    8,
    budget="uniform:8",
    layers=range(1, 7),
    costs=[100, 110, 120, 120, 110, 100],
    fixed_ranks={0: 8, 7: 8},
    fixed_cost=1600,
    profile=[0.1, 0.2, 0.3, 0.3, 0.2, 0.1],
)
SUBLAYERS = RankSpace(
    8,
    (0, 4, 8),
    "uniform:4",
    layers=range(1, 7),
    fixed_ranks={0: 8, 7: 8},
    costs=[10, 20] * 6,
    profile=[0.1, 0.4] * 6,
    granularity="sublayer",
)


def score(ranks):
    """A score that grows with the ranks of the later layers."""
    return sum(rank * (i - 2) for i, rank in enumerate(ranks.values())) / 100


def add_trials(study, space, n):
    """Adds n finished trials within the budget, the uniform configuration first."""
    rng = np.random.default_rng(len(study.trials))
    while len(study.trials) < n:
        ranks = space.uniform()
        for module in rng.permutation(np.asarray(space.modules, dtype=object)) if study.trials else ():
            changed = type(ranks)({**ranks, module: rng.choice(space.candidates)})
            ranks = changed if space.is_feasible(changed) else ranks
        params = space.to_params(ranks)
        trial = optuna.create_trial(params=params, distributions=space.distributions(), value=score(ranks))
        study.add_trial(trial)


@pytest.fixture(scope="session")
def space():
    return SPACE


@pytest.fixture(scope="session")
def by_sublayer():
    return SUBLAYERS


@pytest.fixture(scope="session")
def view_of():
    """Reads a study for views."""
    return lambda study: StudyView.of(StudyReading(study))


@pytest.fixture
def make_study():
    """Makes a study of a space with n finished trials."""

    def make(n=6, space=SPACE, *, direction="maximize", storage=None):
        study = optuna.create_study(
            storage=storage, direction=direction, sampler=RankAdaptorSampler(space, prior=None, seed=0)
        )
        study.set_user_attr("rankadaptor:space", space.to_dict())
        add_trials(study, space, n)
        return study

    return make


@pytest.fixture
def drop_in():
    """Makes a study without a space, whose parameters are named as their owner liked."""

    def make(names=tuple(f"r_{i}" for i in range(8)), n=6, **settings):
        study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0), **settings)
        rng = np.random.default_rng(0)
        for _ in range(n):
            params = {name: int(rng.integers(1, 9)) for name in names}
            values = [score(params)] * len(study.directions)
            ranges = {name: optuna.distributions.IntDistribution(1, 8) for name in names}
            study.add_trial(optuna.create_trial(params=params, distributions=ranges, values=values))
        return study

    return make
