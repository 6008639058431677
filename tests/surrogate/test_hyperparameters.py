from __future__ import annotations

import numpy as np

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.surrogate.bayesian import BayesianModel


def test_the_middle_point_is_one_of_the_grid():
    model = BayesianModel(RankSpace(4), prior=None, n_ordinary=1)
    middle = model.middle_hyperparameters()
    alike = [
        h.noise == middle.noise and np.array_equal(h.mean, middle.mean) and np.array_equal(h.std, middle.std)
        for h in model._hyperparameters
    ]
    assert sum(alike) == 1
