from __future__ import annotations

import optuna
import pytest

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, StopWhenConverged, create_study, recommend
from rankadaptor_optuna.studies.reading import StudyReading, study_space
from rankadaptor_optuna.studies.recommendation import recommend_from
from rankadaptor_optuna.studies.tasks import meta_task

SPACE = RankSpace(4, (2, 4, 8), "uniform:4")


def searched(space=SPACE, n_trials=12, **settings):
    study = create_study(sampler=RankAdaptorSampler(space, prior=None, seed=0), **settings)
    study.optimize(objective, n_trials=n_trials)
    return study


def objective(trial):
    return float(sum((1 + i) * rank for i, rank in SPACE.suggest(trial).items()))


def count_readings(study, monkeypatch, do):
    """Number of times that ``do`` reads all trials from the storage."""
    readings, read = [], study._storage.get_all_trials
    monkeypatch.setattr(study._storage, "get_all_trials", lambda *a, **k: readings.append(a) or read(*a, **k))
    do()
    monkeypatch.undo()
    return len(readings)


@pytest.mark.parametrize("space", [SPACE, None], ids=["space", "drop-in"])
def test_trials_are_read_once(space, monkeypatch):
    study = searched(space)
    assert count_readings(study, monkeypatch, lambda: recommend(study)) == 1
    recommend_from(StudyReading(study))
    assert len(study.trials) == 12  # verifies on demand only
    assert count_readings(study, monkeypatch, lambda: recommend(study, verify=1, seeds=2)) == 1
    study.optimize(objective, n_trials=4)
    assert recommend(study).evidence.n_trials == 12
    assert count_readings(study, monkeypatch, lambda: recommend(study)) == 1
    trial, converged, study.stop = study.trials[0], StopWhenConverged(min_trials=1), lambda: None
    assert count_readings(study, monkeypatch, lambda: converged(study, trial)) == 1
    assert count_readings(study, monkeypatch, lambda: meta_task(study)) == 1


def test_failed_and_infinite_trials_are_not_finished():
    study = create_study(space=SPACE)
    for value in ("nan", "inf", "-inf"):
        study.optimize(lambda trial, value=value: 0 * SPACE.suggest(trial)[1] + float(value), n_trials=1)
    assert StudyReading(study).finished_trials == []
    assert len(StudyReading(study).trials) == 3
    with pytest.raises(ValueError, match="finite score yet: 2 completed with an infinite score, 1 failed"):
        recommend(study)


def test_a_study_opened_elsewhere_knows_its_space(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    searched(storage=url, study_name="s", n_trials=3)
    opened = optuna.load_study(study_name="s", storage=url)
    assert study_space(opened) == SPACE
    assert [t.number for t in StudyReading(opened).uniform_trials] == [0]
    assert SPACE.is_feasible(recommend(opened).ranks)


def test_a_given_space_goes_before_the_studys_own():
    study = searched(n_trials=2)
    wider = RankSpace(4, (2, 4, 8), "uniform:8")
    assert StudyReading(study, wider).space == wider
    assert StudyReading(study, wider).uniform_trials == []


def test_without_a_space_ranks_are_recognised_and_none_is_uniform():
    study = searched(None)
    reading = StudyReading(study)
    assert reading.rank_names == {SPACE.name(layer): layer for layer in range(4)}
    assert reading.uniform_trials == []
    assert reading.ranks(study.trials[0].params) == SPACE.to_ranks(study.trials[0].params)
