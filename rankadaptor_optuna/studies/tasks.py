"""Studies as tasks to meta-learn from, and a prior learned from those of a shared database."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection

from rankadaptor_optuna.attributes import RECIPE_ATTR
from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.studies.reading import study_encoding
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.surrogate.bayesian import BayesianModel

MIN_TRIALS = 10


def meta_task(study: Study, *, min_trials: int = MIN_TRIALS) -> MetaTask:
    """The finished trials of a study as a task to meta-learn from.

    Ranks are those of its rank space, else read off the parameters' names and ranges; any sampler may have made the
    trials. Trials that verify, or were pruned, are left out. Studies of one recipe's model are a family.

    Args:
        study: A study with one objective, minimised or maximised.
        min_trials: Fewest finished trials, at least 2.

    Raises:
        ValueError: It is no task: the message says why.
    """
    if len(study.directions) > 1:
        raise ValueError(f"it has {len(study.directions)} objectives")
    history = History(study)
    history.refresh()
    encoding = study_encoding(study, history)
    if not encoding.rank_names:
        raise ValueError("its finished trials have no rank parameters in common" if history.common else "no trial")
    trials = history.encoded(
        encoding, lambda encoding: BayesianModel(encoding.grid, prior=None, n_ordinary=encoding.width)
    )
    data = trials.data()
    finished = [i for i, variance in enumerate(data.variance) if variance == 0]
    if len(finished) < max(2, min_trials):
        raise ValueError(f"it has {len(finished)} finished trials, fewer than {min_trials}")
    params = [data.trials[i].params for i in finished]
    ranks = np.asarray([encoding.ranks(each) for each in params])
    scores = data.values[finished, 0] * (1.0 if study.direction is StudyDirection.MAXIMIZE else -1.0)
    if len(np.unique(ranks, axis=0)) < 2 or np.ptp(scores) == 0:
        raise ValueError("all its trials have the same ranks, or the same score")
    return MetaTask(
        grid=encoding.grid,
        ranks=ranks,
        scores=scores,
        points=np.asarray([encoding.point(each) for each in params]) if encoding.width else None,
        name=study.study_name,
        family=str(study.user_attrs.get(RECIPE_ATTR, {}).get("model", "")),
    )


def read_tasks(
    storage: str | BaseStorage, patterns: Sequence[str] = (), *, min_trials: int = MIN_TRIALS
) -> tuple[list[MetaTask], dict[str, str]]:
    """Every study in a storage as a task.

    Args:
        storage: An Optuna storage, or a database's URL.
        patterns: Names of the studies, with ``*`` and ``?``. Default: all.
        min_trials: See ``meta_task``.

    Returns:
        The tasks by study name, and why each other study of these names is none.

    Raises:
        ValueError: The storage cannot be opened, or a pattern matches no study.
    """
    opened = open_storage(storage) if isinstance(storage, str) else storage
    names = sorted(optuna.get_all_study_names(opened))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no study is named {pattern!r}; there are {len(names)}: {', '.join(names)!s:.200}.")
    tasks, reasons = [], {}
    for name in names:
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        try:
            tasks.append(meta_task(optuna.load_study(study_name=name, storage=opened), min_trials=min_trials))
        except ValueError as error:
            reasons[name] = str(error)
    return tasks, reasons
