"""RankAdaptorSampler passes the cases that Optuna's own samplers pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase

from rankadaptor_optuna import RankAdaptorSampler, RankSpace


class TestDropIn(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: RankAdaptorSampler(prior=None, seed=0)


class TestWithASpace(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Without the relative cases: their search spaces have no ranks, so the space plays no part."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: RankAdaptorSampler(RankSpace(4, budget="uniform:8"), prior=None, seed=0)
