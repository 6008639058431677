"""Several processes on the priors of one real shared database."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
import pytest

from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.store import PriorStore, Use, Version

pytestmark = pytest.mark.e2e

WRITER = """
import sys
import numpy as np
from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.store import PriorStore
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
    large = Prior(MLP([np.ones((3, 20_000))], [np.zeros(20_000)]), np.zeros(20_000), np.ones(20_000))
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
