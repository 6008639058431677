from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def calibration():
    from benchmarks.race import calibration

    return calibration


def test_collected_tasks_are_judged_on_recoveries_that_were_not_learned_from(calibration, monkeypatch):
    some = list(calibration.files())[:2]
    monkeypatch.setattr(calibration, "files", lambda: iter(some))
    learned = []
    judged = calibration.judged

    def noted(mode, space, known, held_out):
        seen, unseen = ({tuple(ranks) for ranks in part[0].tolist()} for part in (known, held_out))
        learned.append((len(seen), len(unseen), len(seen & unseen)))
        return judged(mode, space, known, held_out)

    monkeypatch.setattr(calibration, "judged", noted)
    found = calibration.on_collected(1)
    assert set(learned) == {(10, 90, 0), (25, 75, 0)}
    assert {key: len(rows) for key, rows in found.items()} == dict.fromkeys(found, 2)
    shares, correlations = np.asarray(found["bayesian", 25])[:, :3], np.asarray(found["bayesian", 25])[:, 3]
    assert (np.diff(shares) >= 0).all()
    assert (correlations > 0.5).all()


def test_what_a_search_promises_is_measured_on_fresh_seeds_and_in_random_spreads(calibration, tmp_path):
    from benchmarks.race.race import FRESH, OURS
    from benchmarks.tasks.synthetic import Synthetic

    class Shifted(Synthetic):
        """Every fresh seed's losses are a hundredfold."""

        def losses(self, configurations, seed, *, report=False):
            assert not report or set(seed) <= set(FRESH)
            found = super().losses(configurations, seed, report=report)
            return [loss * (100 if report else 1) for loss in found]

    def promises(world):
        scores, trials = calibration.open_folder(tmp_path, world.name, world)
        studies = calibration.search(world.name, world.space, scores, trials, 12, 2, [OURS, "Random"])
        return calibration.promises(studies, world.space, scores, 12)

    plain, shifted = (np.asarray(promises(kind(kind.__name__, True, 0.2, 0))) for kind in (Synthetic, Shifted))
    assert plain.shape == (2, 4)
    assert (plain[:, 1] < plain[:, 0]).all()
    assert (plain[:, 0] < plain[:, 2]).all()
    assert (plain[:, 3] > 0).all()
    np.testing.assert_allclose(shifted, plain * [1, 1, 1, 100])


def test_promises_are_kept_where_the_measured_gain_is_in_the_interval(calibration):
    row = calibration.kept("a task", 25, [[2, 1, 3, 2], [2, 1, 3, 0], [2, 1, 3, 0], [2, -1, 3, 4]])
    assert list(row.values()) == ["a task", 25, 4, "2.00", "1.50", "25%", "50%", 3]
