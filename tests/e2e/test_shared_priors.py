"""Several processes on the priors of one real shared database."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
import pytest

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study, recommend
from rankadaptor_optuna.jobs.meta_train import train_prior
from rankadaptor_optuna.priors.choice import uses
from rankadaptor_optuna.priors.store import PriorStore, Use, Version
from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.prior import Prior, load_prior

pytestmark = pytest.mark.e2e

WRITER = """
import sys
import numpy as np
from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.priors.store import PriorStore
prior = Prior(MLP([np.ones((3, 2))], [np.zeros(2)]), np.zeros(2), np.ones(2), {"by": sys.argv[2]})
store = PriorStore(sys.argv[1])
sys.stdin.readline()
print(*(store.add("mine", prior).version for _ in range(5)))
"""


def test_eight_writers_on_a_fresh_database_make_one_chain(url: str, at_once: Callable[..., list[str]]) -> None:
    printed = at_once(WRITER, [url, "one of eight"], 8)
    given = [[int(number) for number in line.split()] for line in printed]
    assert sorted(number for numbers in given for number in numbers) == list(range(1, 41))
    assert all(numbers == sorted(numbers) for numbers in given)
    assert PriorStore(url).load("mine", 17).card == {"by": "one of eight"}


def test_priors_and_studies_leave_each_other_alone(url: str) -> None:
    sizes = [(3, 4000), (4000, 16)]
    large = Prior(MLP([np.full(s, 1e-3) for s in sizes], [np.zeros(s[1]) for s in sizes]), np.zeros(16), np.ones(16))
    store = PriorStore(url)
    for name in ("mine", "Mine"):  # case matters, also where the database's own collation ignores it
        store.add(name, large)
    study = optuna.create_study(storage=url, study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    store.use("s", Version("mine", 1), elsewhere=False)
    assert [s.studies for s in PriorStore(study._storage._backend.engine).versions()] == [(), ("s",)]
    optuna.delete_study(study_name="s", storage=url)
    assert optuna.get_all_study_names(url) == []
    assert store.collect([]) == ([Use("s", Version("mine", 1))], [])
    assert store.load("mine").checksum == large.checksum  # 960 kB: more than a MySQL BLOB holds


BEGIN = """
import sys
from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study
space = RankSpace(6, (2, 4, 8), "uniform:4")
sampler = RankAdaptorSampler(space, prior="db:mine", seed=0)
study = create_study(storage=sys.argv[1], study_name="shared", space=space, sampler=sampler)
sys.stdin.readline()
study.optimize(lambda trial: sum(r * i for i, r in space.suggest(trial).items()), n_trials=3)
print(study.user_attrs["rankadaptor:prior"])
"""


def test_workers_on_one_study_use_one_version_while_others_are_added(
    url: str, at_once: Callable[..., list[str]]
) -> None:
    store = PriorStore(url)
    store.add("mine", load_prior("pretrained"))
    begun = at_once(BEGIN, [url], 3)
    store.add("mine", load_prior("pretrained"))
    resumed = at_once(BEGIN, [url], 1)
    assert {*begun, *resumed} == {"db:mine@1\n"}
    study = optuna.load_study(study_name="shared", storage=url)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 12
    assert recommend(study).evidence.n_trials == 12
    assert store.prune(1, used=uses(study._storage)) == []
    optuna.delete_study(study_name="shared", storage=url)
    assert store.collect(uses(study._storage)) == ([Use("shared", Version("mine", 1))], [Version("mine", 1)])


def test_a_prior_is_learned_and_stored_on_every_database(url: str) -> None:
    for seed in range(3):
        space = RankSpace(4 + seed, (2, 4, 8), "uniform:4")
        sampler = RankAdaptorSampler(space, prior=None, seed=seed)
        study = create_study(storage=url, study_name=f"s{seed}", space=space, sampler=sampler)
        study.optimize(lambda trial, space=space: sum(r * i for i, r in space.suggest(trial).items()), n_trials=10)
    found = train_prior(url, "mine", say=lambda _: None)
    version, prior = found.version, found.prior
    assert PriorStore(url).load(*version).checksum == prior.checksum
