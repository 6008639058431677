from __future__ import annotations

import signal
from types import SimpleNamespace

import optuna
import pytest

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study
from rankadaptor_optuna.database.attributes import VERIFY_ATTR
from rankadaptor_optuna.jobs.worker import run_trials, trial_line

SPACE = RankSpace(6, (2, 4, 8), "uniform:4")


class Job:
    """An objective without a model; at some trial a signal comes."""

    training, direction, metric, space = SimpleNamespace(steps=1), "maximize", "accuracy", SPACE

    def __init__(self, interrupted=None, number=signal.SIGINT):
        self.interrupted, self.number = interrupted, number

    def __call__(self, trial):
        ranks = SPACE.suggest(trial)
        if trial.number == self.interrupted:
            signal.raise_signal(self.number)
        return float(sum(i * rank for i, rank in ranks.items()))


@pytest.fixture
def new_study(tmp_path):
    def new(name):
        sampler = RankAdaptorSampler(SPACE, seed=0)
        storage = f"sqlite:///{tmp_path / 'study.db'}"
        return create_study(storage=storage, study_name=name, space=SPACE, sampler=sampler, recipe={"a": 1})

    return new


def outcome(study):
    return [(t.state.name, t.params, t.value) for t in study.trials]


@pytest.fixture
def whole(new_study):
    """The outcome of a search that nothing interrupts."""
    study = new_study("whole")
    run_trials(study, Job(), 5, shared=True)
    return outcome(study)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_interrupted_in_a_trial_and_resumed_is_the_same_as_a_whole_one(new_study, whole, number):
    before = signal.getsignal(number)
    study = new_study("s")
    with pytest.raises(KeyboardInterrupt):
        run_trials(study, Job(interrupted=2, number=number), 5, shared=True)
    assert [state for state, *_ in outcome(study)] == ["COMPLETE", "COMPLETE", "WAITING"]
    assert study.trials[2].params == whole[2][1]
    assert signal.getsignal(number) is before
    run_trials(new_study("s"), Job(), 5, shared=True)
    assert outcome(study) == whole


@pytest.mark.parametrize("step", ["ask", "tell"])
def test_a_search_interrupted_while_it_asks_or_stores_is_the_same_too(new_study, whole, step, monkeypatch, capfd):
    study = new_study("s")
    call = getattr(study, step)

    def interrupted(*args, **kwargs):
        if len(study.trials) == 3 - (step == "ask"):
            signal.raise_signal(signal.SIGINT)
        return call(*args, **kwargs)

    monkeypatch.setattr(study, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_trials(study, Job(), 5, shared=True)
    assert outcome(study)[2][0] == {"ask": "WAITING", "tell": "COMPLETE"}[step]
    assert "Interrupted: stops as soon as" in capfd.readouterr().err
    run_trials(new_study("s"), Job(), 5, shared=True)
    assert outcome(study) == whole


def test_failed_and_pruned_trials_are_told(new_study):
    study = new_study("s")

    def job(trial):
        SPACE.suggest(trial)
        if trial.number == 0:
            return float("nan")
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 3:
            raise ZeroDivisionError
        return 1.0

    job.training, job.direction = Job.training, "maximize"
    with pytest.raises(ZeroDivisionError):
        run_trials(study, job, 9, shared=False)
    assert [t.state.name for t in study.trials] == ["FAIL", "PRUNED", "COMPLETE", "FAIL"]


def test_only_failures_end_after_five_in_a_row(new_study):
    study = new_study("s")

    def job(trial):
        trial.set_user_attr("fail_reason", "RuntimeError: out of \x1b memory")
        return float("nan")

    job.training, job.direction = Job.training, "maximize"
    with pytest.raises(ValueError, match=r"no trial finished; .* RuntimeError: out of \\x1b memory"):
        run_trials(study, job, 3, shared=True)
    assert len(study.trials) == 5


def test_failed_and_verification_trials_use_up_no_tries(new_study):
    study, lines = new_study("s"), []
    for seed in (7, 8):
        study.enqueue_trial({}, user_attrs={VERIFY_ATTR: seed})

    def job(trial):
        SPACE.suggest(trial)
        return float("nan") if trial.number in (3, 4, 6) or trial.number > 8 else 1.0

    job.training, job.direction = Job.training, "maximize"
    run_trials(study, job, 4, shared=False, say=lines.append)
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] * 2 + ["COMPLETE", "FAIL"] + ["COMPLETE"] * 2
    run_trials(study, job, 6, shared=False, say=lines.append)
    assert len(study.trials) == 14
    assert lines[-1] == "Stopped after 5 failed trials in a row, at 4 of 6."


def test_a_trials_line_says_its_score_and_what_changed(new_study, capfd):
    study, lines = new_study("s"), []
    for ranks in ({}, {2: 8, 3: 8, 5: 8, 0: 2, 4: 2}):
        study.enqueue_trial(SPACE.to_params(SPACE.uniform() | ranks))
    run_trials(study, Job(), 2, shared=False, say=lines.append)
    assert lines == [
        "Trial 0: accuracy 60.0000; uniform ranks",
        "Trial 1: accuracy 92.0000; more rank in 2-3 5, less rank in 0 4",
    ]
    assert "\r" not in capfd.readouterr().err, "no progress bar outside of a terminal"
    failed = optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"fail_reason": "a\nb"})
    assert trial_line(failed, SPACE, "loss").endswith(": fail (a b)")
