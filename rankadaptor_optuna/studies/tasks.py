"""Studies as tasks to meta-learn from."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from rankadaptor_optuna.checks.plain_text import one_line
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.surrogate.bayesian import BayesianModel

MIN_TRIALS = 10  # set by hand


def meta_task(study: Study, *, min_trials: int = MIN_TRIALS) -> MetaTask:
    """Returns the completed trials of a study's search as a task to meta-learn from.

    Its ranks are those of its rank space, else those recognised by the parameters' names and ranges; any sampler may
    have made the trials. Verification trials and pruned trials are left out. Studies whose recipes name the same model
    are a family.

    Args:
        study: A study with one objective.
        min_trials: Smallest number of completed trials, at least 2.

    Raises:
        ValueError: The study is no task; the message gives the reason.
    """
    if len(study.directions) > 1:
        raise ValueError(f"it has {len(study.directions)} objectives")
    reading = StudyReading(study)
    encoding = reading.encoding
    if not encoding.rank_names:
        raise ValueError("its trials have no parameters named like ranks" if reading.history.finished else "no trial")
    trials = reading.history.encoded(
        encoding, lambda encoding: BayesianModel(encoding.grid, prior=None, n_ordinary=encoding.width)
    )
    observations = trials.observations()
    complete = np.flatnonzero(observations.variance == 0)  # without pruned trials
    if len(complete) < max(2, min_trials):
        raise ValueError(f"it has {len(complete)} finished trials, fewer than {min_trials}")
    params = [observations.trials[i].params for i in complete]
    ranks = np.asarray([encoding.ranks(each) for each in params])
    scores = reading.sign * observations.values[complete, 0]
    if len(np.unique(ranks, axis=0)) < 2 or np.ptp(scores) == 0:
        raise ValueError("all its trials have the same ranks, or the same score")
    return MetaTask(
        grid=encoding.grid,
        ranks=ranks,
        scores=scores,
        points=np.asarray([encoding.point(each) for each in params]) if encoding.width else None,
        name=study.study_name,
        family=str(reading.recipe.get("model", "")),
    )


def read_tasks(
    storage: str | BaseStorage, patterns: Sequence[str] = (), *, min_trials: int = MIN_TRIALS
) -> tuple[list[MetaTask], dict[str, str]]:
    """Reads the studies in a storage as tasks.

    Args:
        storage: An Optuna storage, or the URL of a database.
        patterns: Names of the studies, with ``*`` and ``?``. Default: all.
        min_trials: See ``meta_task``.

    Returns:
        The tasks in order of study name, and the reason why each other study of these names is none.

    Raises:
        ValueError: The storage cannot be opened, or a pattern matches no study.
    """
    opened = open_storage(storage, create=False) if isinstance(storage, str) else storage
    names = sorted(optuna.get_all_study_names(opened))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"no study is named {pattern!r}; there are {len(names)}: {one_line(', '.join(names))!s:.200}."
            )
    tasks, reasons = [], {}
    for name in names:
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        try:
            tasks.append(meta_task(optuna.load_study(study_name=name, storage=opened), min_trials=min_trials))
        except ValueError as error:
            reasons[name] = str(error)
    return tasks, reasons
