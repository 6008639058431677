from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study, recommend
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.studies.tasks import meta_task, read_tasks

optuna.logging.set_verbosity(optuna.logging.WARNING)


def new_study(url=None, name="s", direction="maximize", **settings):
    settings = {"sampler": RandomSampler(seed=0), **settings}
    return optuna.create_study(storage=url, study_name=name, direction=direction, **settings)


def searched(url, name, direction="maximize", scale=1.0, n_trials=12, **settings):
    space = RankSpace(4, (2, 4, 8), "uniform:4")
    sampler = RankAdaptorSampler(space, prior=None, seed=len(name))
    study = create_study(storage=url, study_name=name, space=space, sampler=sampler, direction=direction, **settings)
    sign = 1 if direction == "maximize" else -1

    study.optimize(lambda t: sign * scale * sum(r / (1 + i) for i, r in space.suggest(t).items()), n_trials=n_trials)
    return study


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'studies.db'}"


def test_a_study_with_a_space_becomes_a_task(url):
    study = searched(url, "s", direction="minimize", recipe={"model": "tiny"})
    task = meta_task(optuna.load_study(study_name="s", storage=url))
    assert (task.name, task.family, task.points) == ("s", "tiny", None)
    assert task.grid.costs.tolist() == [1] * 4
    assert task.ranks.tolist() == [[t.params[f"layer_{i:02}_rank"] for i in range(4)] for t in study.trials]
    assert task.scores.tolist() == [-t.value for t in study.trials]  # higher is better


def test_a_foreign_study_becomes_a_task_with_its_other_parameters():
    study = new_study()

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        return lr + sum(trial.suggest_int(f"block_{i}.r", 0, 8) for i in (11, 2, 5))

    study.optimize(objective, n_trials=12)
    task = meta_task(study)
    assert task.ranks[3].tolist() == [study.trials[3].params[f"block_{i}.r"] for i in (2, 5, 11)]
    assert task.points.shape == (12, 1)
    assert ((task.points >= 0) & (task.points <= 1)).all()
    assert task.points[:, 0].argmax() == np.argmax([t.params["lr"] for t in study.trials])


def test_a_study_by_sublayers_becomes_a_task_of_two_series():
    space = RankSpace(4, (2, 4, 8), "uniform:4", granularity="sublayer")
    study = new_study(sampler=RankAdaptorSampler(space, prior=None, seed=0))
    study.optimize(lambda trial: float(sum(space.suggest(trial).values())) + trial.number, n_trials=10)
    task = meta_task(study)
    assert task.grid.series.tolist() == [0, 1] * 4
    assert task.ranks.shape == (10, 8)


def test_trials_that_verify_failed_or_were_pruned_are_left_out():
    space = RankSpace(4, (2, 4, 8), "uniform:4")
    study = new_study(sampler=RankAdaptorSampler(space, prior=None, seed=0))

    def objective(trial):
        ranks = space.suggest(trial)
        trial.report(float(trial.number), 1)
        if trial.number == 11:
            raise optuna.TrialPruned
        return float("nan") if trial.number == 12 else sum(i * r for i, r in ranks.items()) + 0.1

    study.optimize(objective, n_trials=13)
    recommend(study, verify=1, seeds=2)
    study.optimize(objective, n_trials=4)
    assert len(study.trials) == 17
    assert len(meta_task(study).scores) == 11


def of_configurations(*ranks, n_trials=10):
    study = new_study()
    space = RankSpace(3, (2, 4, 8))
    for i in range(n_trials):
        params = dict(zip(space.names, ranks[i % len(ranks)], strict=True))
        study.add_trial(optuna.create_trial(params=params, distributions=space.distributions(), value=float(i)))
    return study


def test_two_configurations_on_ten_trials_make_a_task():
    assert len(meta_task(of_configurations((2, 4, 8), (8, 4, 2))).scores) == 10
    assert len(meta_task(of_configurations((2, 4, 8), (8, 4, 2), n_trials=2), min_trials=1).scores) == 2


def one_configuration():
    return of_configurations((2, 4, 8))


def several_objectives():
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(lambda trial: (trial.suggest_int("r_0", 0, 4), 1.0), n_trials=1)
    return study


def no_ranks():
    study = new_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=11)
    return study


def short():
    return searched(None, "short", n_trials=9)


def constant():
    return searched(None, "constant", scale=0.0)


def failed():
    space = RankSpace(4, (2, 4, 8), "uniform:4")
    study = new_study(sampler=RankAdaptorSampler(space, prior=None, seed=0))
    study.optimize(lambda trial: 0 * space.suggest(trial)[0] + float("nan"), n_trials=11)
    return study


@pytest.mark.parametrize(
    ("study", "why"),
    [
        (failed, "0 finished trials, fewer than 10"),
        (several_objectives, "2 objectives"),
        (no_ranks, "no parameters named like ranks"),
        (new_study, "no trial"),
        (short, "9 finished trials, fewer than 10"),
        (constant, "the same score"),
        (one_configuration, "the same ranks"),
    ],
)
def test_why_a_study_is_no_task_is_said(study, why):
    with pytest.raises(ValueError, match=why):
        meta_task(study())


def test_all_studies_of_a_pattern_are_read_and_the_reasons_of_the_others():
    url = optuna.storages.InMemoryStorage()
    for name in ("a-1", "a-2", "b-1"):
        searched(url, name)
    new_study(url, "a-empty")
    tasks, reasons = read_tasks(url, ["a-*"])
    assert [task.name for task in tasks] == ["a-1", "a-2"]
    assert list(reasons) == ["a-empty"]
    assert [task.name for task in read_tasks(url, ["b-?", "a-1"])[0]] == ["a-1", "b-1"]
    with pytest.raises(ValueError, match=r"no study is named 'c\*'; there are 4: a-1, a-2, a-empty, b-1"):
        read_tasks(url, ["c*"])


def test_a_study_that_knows_its_layers_sensitivities_teaches_them(url):
    study = searched(url, "s")
    known = {name: float(i) for i, name in enumerate(sorted(study.trials[0].params))}
    study.set_user_attr(SENSITIVITY_ATTR, known)
    assert meta_task(study).grid.sensitivity.tolist() == [0, 1, 2, 3]
