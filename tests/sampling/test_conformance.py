"""RankAdaptorSampler passes the cases that Optuna's own samplers pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase

from rankadaptor_optuna import RankAdaptorSampler, RankSpace


class TestRankAdaptorSampler(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=[None, RankSpace(4, budget="uniform:8")], ids=["drop-in", "with a space"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: RankAdaptorSampler(request.param, prior=None, seed=0)
