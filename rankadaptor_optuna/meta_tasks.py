"""Studies as tasks to meta-learn from, and a prior learned from those of a shared database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from tqdm import tqdm

from rankadaptor_optuna.history import History
from rankadaptor_optuna.study import RECIPE_ATTR, masked, open_storage, study_encoding
from rankadaptor_optuna.surrogate.meta import MAX_EPOCHS, MetaTask, meta_train
from rankadaptor_optuna.surrogate.model import PerformanceModel
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.store import PriorStore, Version, parse_reference

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
        encoding, lambda encoding: PerformanceModel(encoding.grid, prior=None, n_ordinary=encoding.width)
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


def train_prior(
    storage_url: str,
    name: str = "default",
    patterns: Sequence[str] = (),
    *,
    min_trials: int = MIN_TRIALS,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[Version, Prior]:
    """Learns a prior from the studies of a shared database, and adds it there as the next version of ``name``.

    Args:
        storage_url: The database.
        name: The prior's name: ``db:NAME`` is what a sampler takes.
        patterns: Names of the studies to learn from. Default: all.
        min_trials: Fewest finished trials of a study.
        seed: See ``meta_train``.
        say: Receives one line for each step; a progress bar shows the training.

    Raises:
        ValueError: The storage cannot be opened, or has fewer than two tasks.
    """
    if parse_reference(f"db:{name}")[1] is not None:
        raise ValueError(f"give a name without a version, which it will get, not {name!r}.")
    tasks, reasons = read_tasks(storage_url, patterns, min_trials=min_trials)
    for study, why in reasons.items():
        say(f"Not learned from: study {study!r}: {why}")
    if len(tasks) < 2:
        raise ValueError(f"{masked(storage_url)} has {len(tasks)} studies to learn from; meta-learning needs two.")
    say(f"Learning from {len(tasks)} studies, {sum(len(task.scores) for task in tasks)} trials")
    with tqdm(total=MAX_EPOCHS, desc="meta-train", leave=False, dynamic_ncols=True) as bar:

        def progress(epoch: int, loss: float) -> None:
            bar.set_postfix_str(f"held-out loss {loss:.3f}", refresh=False)
            bar.update()

        prior = meta_train(tasks, seed=seed, progress=progress)
    return PriorStore(storage_url).add(name, prior), prior
