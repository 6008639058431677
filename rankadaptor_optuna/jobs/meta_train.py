"""Learn a prior from the studies of a shared database."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rankadaptor_optuna.database.connections import masked
from rankadaptor_optuna.jobs.output import bar
from rankadaptor_optuna.jobs.results import TrainedPrior
from rankadaptor_optuna.priors.meta import MAX_EPOCHS, meta_train
from rankadaptor_optuna.priors.store import PriorStore, parse_reference
from rankadaptor_optuna.studies.tasks import MIN_TRIALS, read_tasks


def train_prior(
    storage_url: str,
    name: str = "default",
    patterns: Sequence[str] = (),
    *,
    min_trials: int = MIN_TRIALS,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> TrainedPrior:
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
        raise ValueError(f"studies to learn from in {masked(storage_url)}: {len(tasks)}; meta-learning needs two.")
    say(f"Learning from {len(tasks)} studies, {sum(len(task.scores) for task in tasks)} trials")
    with bar("meta-train", MAX_EPOCHS) as shown:

        def progress(epoch: int, loss: float) -> None:
            shown.set_postfix_str(f"held-out loss {loss:.3f}", refresh=False)
            shown.update()

        prior = meta_train(tasks, seed=seed, progress=progress)
    return TrainedPrior(PriorStore(storage_url).add(name, prior), prior, len(tasks), reasons)
