from __future__ import annotations

import numpy as np
import pytest

from benchmarks.race import calibration
from benchmarks.race.peers import samplers
from benchmarks.race.search import open_folder, search
from benchmarks.report import FRESH
from benchmarks.tasks.collect import collected
from benchmarks.tasks.synthetic import Synthetic


def test_collected_tasks_are_judged_on_recoveries_that_were_not_learned_from(monkeypatch):
    learned = []
    judged = calibration.judged

    def noted(mode, space, known, held_out):
        seen, unseen = ({tuple(ranks) for ranks in part[0].tolist()} for part in (known, held_out))
        learned.append((len(seen), len(unseen), len(seen & unseen)))
        return judged(mode, space, known, held_out)

    monkeypatch.setattr(calibration, "judged", noted)
    found = calibration.on_collected(collected()[:1], 1)
    assert set(learned) == {(10, 90, 0), (25, 75, 0)}
    (*shares, correlation), *_ = found["bayesian", 25]
    assert (np.diff(shares) >= 0).all()
    assert correlation > 0.5


@pytest.mark.filterwarnings("ignore:AutoSampler is left out")
def test_promises_are_measured_on_fresh_seeds_in_standard_deviations_of_random_allocations(tmp_path):
    class Shifted(Synthetic):
        """Every fresh seed's losses are a hundredfold."""

        def losses(self, configurations, seed, *, report=False):
            assert not report or set(seed) <= set(FRESH)
            found = super().losses(configurations, seed, report=report)
            return [loss * (100 if report else 1) for loss in found]

    def promises(task):
        losses, trials = open_folder(tmp_path, task.name, task)
        studies = search(task.space, losses, trials, 10, 1, {who: samplers()[who] for who in ("RankAdaptor", "Random")})
        return calibration.promises(studies, task.space, losses, 10)

    plain, shifted = (np.asarray(promises(kind(kind.__name__, True, 0.2, 0))) for kind in (Synthetic, Shifted))
    assert plain.shape == (1, 4)
    assert (plain[:, 1] < plain[:, 0]).all()
    assert (plain[:, 0] < plain[:, 2]).all()
    assert (plain[:, 3] > 0).all()
    np.testing.assert_allclose(shifted, plain * [1, 1, 1, 100])


def test_promises_are_kept_where_the_measured_gain_is_in_the_interval():
    row = calibration.promise_row("a task", 25, [[2, 1, 3, 2], [2, 1, 3, 0], [2, 1, 3, 0], [2, -1, 3, 4]])
    assert list(row.values()) == ["a task", 25, 4, "2.00", "1.50", "25%", "50%", 3]


def test_goals_are_ten_points_for_intervals_and_the_papers_order():
    found = {(mode, n): [[0.5, 0.8, 0.95, 0.6]] for mode in calibration.MODES for n in calibration.LEARNED_FROM}
    found["bayesian", 10] = [[0.65, 0.89, 0.98, 0.5]]
    checks = calibration.checks_of("raced", found)
    missed = [what for what, check in checks.items() if not check["ok"]]
    assert missed == [
        "raced: 50% interval after 10 trials, off by",
        "raced: rank correlation after 10 trials, above the paper mode's by",
    ]
