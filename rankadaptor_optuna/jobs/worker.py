"""A worker: runs trials of a study, alone or with others on one database, until enough are done."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.database.connections import UnreachableError
from rankadaptor_optuna.jobs.output import bar
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.patient_storage import hand_back

_MOST_FAILURES = 5  # failed trials in a row after which a worker stops; set by hand
_STOPPING = b"\nInterrupted: stops as soon as the database has the trial. Interrupt again to stop at once.\n"


class Interrupts:
    """Takes SIGINT and SIGTERM for the time of the context: within a trial at once, elsewhere after the current step.

    So no trial is interrupted while it is asked for or stored. A second signal interrupts at once in any case.
    """

    def __init__(self) -> None:
        self._at_once = self._pending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self._pending:
            raise KeyboardInterrupt
        self._pending = True
        os.write(2, _STOPPING)  # print may be interrupted itself

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self._pending:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For the time of the context, a signal interrupts at once; so does an earlier signal."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False


def run_trial(study: Study, job: Callable[[Any], float], interrupts: Interrupts) -> FrozenTrial:
    """Asks for a trial, runs it and tells the result; an interrupted trial is handed back and waits for a worker.

    Raises:
        KeyboardInterrupt: A signal came.
        Exception: The objective's, after the trial has been told to have failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's: it has heartbeats in optimize only, and they are experimental
        optuna.storages.fail_stale_trials(study)
        trial = study.ask()
    try:
        with interrupts.at_once():
            value = job(trial)
    except KeyboardInterrupt:
        hand_back(study, trial)
        raise
    except optuna.TrialPruned:
        return study.tell(trial, state=TrialState.PRUNED)
    except UnreachableError:
        raise
    except Exception:  # raised on, as soon as the trial no longer stays RUNNING
        study.tell(trial, state=TrialState.FAIL)
        raise
    if isinstance(value, float) and math.isnan(value):
        return study.tell(trial, state=TrialState.FAIL)
    return study.tell(trial, value)


def run_trials(
    study: Study,
    job: RecoveryObjective,
    n_trials: int,
    *,
    shared: bool,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs trials up to a number of finished trials, which all workers on a shared storage reach together.

    Args:
        study: The study.
        job: Its objective; a progress bar follows its steps.
        n_trials: Number of completed or pruned trials to reach, verification trials not counted. A worker stops earlier
            after 5 failed trials in a row.
        shared: Whether other workers may run trials: these count while they run, and the end waits for them.
        say: Receives one line for each trial.

    Raises:
        ValueError: No trial finished; the message says why the last one failed.
        KeyboardInterrupt: SIGINT or SIGTERM came; the running trial waits for a worker.
    """
    steps = job.training.steps

    def trials(*states: TrialState) -> list[FrozenTrial]:
        return [t for t in study.get_trials(deepcopy=False, states=states) if verification_seed(t) is None]

    def n_done() -> int:
        return len(trials(TrialState.COMPLETE, TrialState.PRUNED))

    def n_elsewhere() -> int:
        return len(trials(TrialState.RUNNING)) if shared else 0

    missing = n_trials - n_done()
    if missing <= 0:
        return
    with bar("search", missing * steps) as shown, Interrupts() as interrupts:

        def describe(doing: str = "search") -> None:
            done = trials(TrialState.COMPLETE)
            better = min if job.direction == "minimize" else max
            best = f", best {better(t.value for t in done if t.value is not None):.4f}" if done else ""
            shown.total = shown.n + max(0, n_trials - n_done()) * steps  # other workers run some of the trials
            shown.set_description(f"      {doing}, {n_done()} of {n_trials} trials{best}")

        job.on_step = lambda step, loss: shown.update(1)
        in_a_row = 0  # failed trials of this worker
        try:
            while (missing > 0 and in_a_row < _MOST_FAILURES) or n_elsewhere():
                if in_a_row == _MOST_FAILURES or missing <= n_elsewhere():  # all workers recommend from the same trials
                    describe("waiting for other workers")
                    with interrupts.at_once():
                        time.sleep(1)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                        optuna.storages.fail_stale_trials(study)
                    missing = n_trials - n_done()
                    continue
                describe()
                finished = run_trial(study, job, interrupts)
                if verification_seed(finished) is None:
                    in_a_row = in_a_row + 1 if finished.state is TrialState.FAIL else 0
                with tqdm.external_write_mode():
                    say(trial_line(finished, getattr(job, "space", None), getattr(job, "metric", "score")))
                interrupts.check()
                missing = n_trials - n_done()
        finally:
            job.on_step = None
    if in_a_row == _MOST_FAILURES:
        say(f"Stopped after {in_a_row} failed trials in a row, at {n_done()} of {n_trials}.")
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        reason = one_line(study.trials[-1].user_attrs.get("fail_reason", "no reason recorded"))
        raise ValueError(f"no trial finished; the last one failed with {reason}")


def trial_line(trial: FrozenTrial, space: RankSpace | None, metric: str) -> str:
    """Returns a trial's score, and where its ranks differ from the uniform ones, in one line."""
    score = f"{metric} {trial.value:.4f}" if trial.state is TrialState.COMPLETE and trial.value is not None else ""
    what = score or trial.state.name.lower()
    if trial.state is TrialState.FAIL:
        what += f" ({one_line(trial.user_attrs.get('fail_reason', 'no reason recorded'))})"
    return f"Trial {trial.number}: {what}{_changes(trial, space)}"


def _changes(trial: FrozenTrial, space: RankSpace | None) -> str:
    if space is None or not space.names.keys() <= trial.params.keys():
        return ""
    ranks: Ranks = Ranks({module: trial.params[name] for name, module in space.names.items()})
    uniform = space.uniform()
    more, less = (
        [i for i, module in enumerate(ranks) if sign * (ranks[module] - uniform[module]) > 0] for sign in (1, -1)
    )
    if not more and not less:
        return "; uniform ranks"
    modules = list(map(str, ranks))
    parts = [f"{word} rank in {_ranges(rows, modules)}" for word, rows in (("more", more), ("less", less)) if rows]
    return f"; {', '.join(parts)}"


def _ranges(rows: list[int], names: list[str]) -> str:
    """Returns the names of some rows, such as ``3, 5-9``."""
    found: list[list[int]] = []
    for row in rows:
        if found and row == found[-1][-1] + 1:
            found[-1].append(row)
        else:
            found.append([row])
    return " ".join(names[run[0]] if len(run) == 1 else f"{names[run[0]]}-{names[run[-1]]}" for run in found)
