from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def calibration(importable):
    import calibration

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
