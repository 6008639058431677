"""``transfer.py`` with many more searches than can be recovered: on functions fitted to the collected recoveries.

    python -m benchmarks.transfer_simulated [--quick] [--seeds 10] [--trials 25] [--folder DIR]

The families and competitors are those of ``transfer.py``. A task of a family held out is a Gaussian process (linear and
RBF kernels on the log ranks, by scikit-learn: a model that no competitor uses) fitted to the task's hundred real
recoveries; a trial's score is its mean plus noise of the size by which such functions err on recoveries that they were
not fitted to. How well they order these is shown with the results. What a search found is scored without the noise.

Each family has up to three such tasks (as many as were collected); a family's regret is the mean over these.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

from benchmarks.race.transfer import CHECKPOINTS, FAMILIES, Regrets, read_sources, regrets, summarise, transfer
from benchmarks.report import FOLDER, interval, show, write
from benchmarks.tasks.collect import TASKS, files, read_pruned_loss, read_space, read_task
from benchmarks.tasks.losses import Ranks
from benchmarks.tasks.smollm2 import SMOLLM2
from benchmarks.tasks.synthetic import standard_normal
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.surrogate.grid import Array

N_FOLDS = 5


class FittedTask:
    """A function of the ranks that was fitted to a collected task's recoveries, and their noise.

    Args:
        file: The task, as ``collect_tasks.py`` keeps it.

    Attributes:
        name: Its name.
        family: Its family.
        space: Its rank space.
        pruned_loss: Its loss without recovery.
    """

    def __init__(self, file: Path) -> None:
        collected = read_task(file)
        self.name, self.family = collected.name, collected.family
        self.space, self.pruned_loss = read_space(file), read_pruned_loss(file)
        self._sensitivity = dict(zip(self.space.layers, collected.grid.sensitivity.tolist(), strict=True))
        self._ranks, self._losses = collected.ranks, -collected.scores

    def sensitivity(self, seed: int) -> dict[int, float]:
        """That which was measured with the recoveries, whatever the seed."""
        return self._sensitivity

    def _fitted(self, rows: NDArray[np.intp]) -> GaussianProcessRegressor:
        kernel = ConstantKernel() * DotProduct() + ConstantKernel() * RBF(5, (0.5, 100)) + WhiteKernel(0.1, (1e-3, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale or a noise at its bound
            model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
            return model.fit(self._scaled(self._ranks[rows]), self._losses[rows])

    def _scaled(self, ranks: Array) -> Array:
        known = np.log2(1 + self._ranks)
        scaled: Array = (np.log2(1 + ranks) - known.mean(0)) / known.std()
        return scaled

    @cached_property
    def _model(self) -> GaussianProcessRegressor:
        return self._fitted(np.arange(len(self._ranks)))

    @cached_property
    def _predicted(self) -> Array:
        """Each recovery as functions that were fitted to others have it, (n,)."""
        fold = np.arange(len(self._ranks)) % N_FOLDS
        predicted = np.empty(len(self._ranks))
        for k in range(N_FOLDS):
            predicted[fold == k] = self._fitted(np.flatnonzero(fold != k)).predict(self._scaled(self._ranks[fold == k]))
        return predicted

    @cached_property
    def noise(self) -> float:
        """Standard deviation of a trial's score about the function."""
        return float(np.std(self._losses - self._predicted))

    @cached_property
    def fidelity(self) -> float:
        """Rank correlation of recoveries and what functions that were fitted to others predict for them."""
        return float(stats.spearmanr(self._predicted, self._losses).statistic)

    def losses(self, configurations: Sequence[Ranks], seed: Sequence[int], *, report: bool = False) -> list[float]:
        """Losses of configurations; with the noise, the same each time for a seed, but in the report."""
        ranks = np.asarray([list(each.values()) for each in configurations], dtype=np.float64)
        means: list[float] = self._model.predict(self._scaled(ranks)).tolist()
        if report:
            return means
        return [
            mean + self.noise * standard_normal([self.name, own, *each.values()])
            for mean, each, own in zip(means, configurations, seed, strict=True)
        ]


def joined(tasks: Sequence[Regrets]) -> Regrets:
    """The regrets of a family: of each search the mean over its tasks."""
    return {who: {n: np.mean([task[who][n] for task in tasks], axis=0) for n in by} for who, by in tasks[0].items()}


def main() -> None:
    """Runs what is missing and writes results/transfer_simulated.json, or transfer_simulated_part.json with --quick."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two seeds, 10 trials, the first family")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=CHECKPOINTS[-1])
    parser.add_argument("--folder", type=Path, default=cache_dir() / "transfer_simulated", help="trials and losses")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.trials = 2, 10
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.folder.mkdir(parents=True, exist_ok=True)
    sources, start = read_sources(), time.process_time()
    families: dict[str, list[Regrets]] = {}
    fits: list[dict[str, Any]] = []
    for family in FAMILIES[:1] if args.quick else (*FAMILIES, SMOLLM2.family):
        for task in (task for task in map(FittedTask, files(TASKS)) if task.family == family):
            found = transfer(
                family, task, sources, args.folder, args.trials, args.seeds, task.name, FOLDER / "transfer"
            )
            families.setdefault(family, []).append(regrets(found))
            fits.append(
                {
                    "task": task.name,
                    "rank correlation": f"{task.fidelity:.3f}",
                    "noise / sd of random allocations": f"{task.noise / found['random sd']:.2f}",
                }
            )
    show(fits)
    mean, half = interval([float(fit["rank correlation"]) for fit in fits])
    print(
        f"Recoveries that a function was not fitted to are ordered with a rank correlation of {mean:.3f} ±{half:.3f}."
    )
    rows, checks, where = summarise({family: joined(tasks) for family, tasks in families.items()})
    show(rows)
    print(where)
    write(
        "transfer_simulated_part" if args.quick else "transfer_simulated",
        rows,
        checks,
        seeds={"searches": args.seeds, "meta-training": 0},
        where=where,
        fits=fits,
        cpu_seconds_of_this_run=round(time.process_time() - start),
    )


if __name__ == "__main__":
    main()
