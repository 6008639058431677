"""Offline meta-learning: learns the prior's MLP, and the mean and spread of its output weights, from finished studies.

It maximises the marginal likelihood of all tasks' scores under the Bayesian head, jointly over the MLP and the Gaussian
over its output weights, as in adaptive Bayesian linear regression (Perrone et al., 2018, "Scalable Hyperparameter
Transfer Learning"). The paper meta-learns a plain MLP (section 3.2, "offline meta-learning"): see ``pretraining``.

Notation of the loss of one task, with n of its trials:
    y       (n,)    standardised scores
    v       (n,)    extra variance of bad scores' noise, as in the head
    X       (n, F)  features of the head that are not learned, with their prior N(m, S) at the grid's middle point
    Z       (n, M)  outputs of the MLP, summed over layers, less those of the uniform configuration
    a, D    (M,), (M, M)  mean and diagonal covariance of the output weights, learned
    K       X S X' + Z D Z' + noise^2 I + diag(v)
    loss    (log|K| + (y - Xm - Za)' K^-1 (y - Xm - Za)) / 2n, plus a small penalty on a and log D
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from rankadaptor_optuna import __version__
from rankadaptor_optuna.surrogate.bayesian import BayesianModel
from rankadaptor_optuna.surrogate.features import MLP, N_INPUTS, mlp_inputs
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.statistics import rank_correlation

# set by hand, like the defaults of ``meta_train``
MAX_EPOCHS = 200
_NOISE = 0.2  # of standardised scores
_PENALTY = 1e-3  # keeps the distribution of unused outputs' weights finite
_MIN_IMPROVEMENT = 1e-4  # of the held-out loss
_FEWEST = 4  # trials of a task in a step
_FEWEST_MEASURED = 6  # trials of a task on which transfer is measured
_KIND: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's defaults are


@dataclass(frozen=True)
class MetaTask:
    """One finished study.

    Attributes:
        grid: The searched layers.
        ranks: Ranks of each trial, (n, L).
        scores: Scores of the trials, (n,), higher is better, on any scale.
        points: The ordinary parameters in the unit cube, (n, E). Default: none.
        name: Name of the task, for the card.
        family: Name of the family of related tasks (of one model, say), which are held out together. Default: the task
            is a family of its own.
    """

    grid: RankGrid
    ranks: Array
    scores: Array
    points: Array | None = None
    name: str = ""
    family: str = ""

    def model(self, prior: Prior | None) -> BayesianModel:
        """Returns a performance model of the task's search space without observations."""
        return BayesianModel(self.grid, prior=prior, n_ordinary=0 if self.points is None else self.points.shape[1])

    def without_sensitivity(self) -> MetaTask:
        """Returns the same task with unknown sensitivities."""
        return replace(self, grid=replace(self.grid, sensitivity=np.zeros(self.grid.n_layers)))

    def points_of(self, rows: slice) -> Array | None:
        """Returns the ordinary parameters of some trials."""
        return None if self.points is None else self.points[rows]


def meta_train(
    tasks: Sequence[MetaTask],
    *,
    held_out: float = 0.2,
    n_features: int = 8,
    hidden: int = 32,
    max_epochs: int = MAX_EPOCHS,
    patience: int = 20,
    subset: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Prior:
    """Learns a prior from tasks, and stops early on held-out tasks.

    The tasks' sensitivities are ignored: where they are known there is little left to learn, and a prior learned beside
    them does not hold where they are unknown (``python -m benchmarks.pretrain_prior`` measures both).

    The prior's card holds the names of the tasks, the time, and the transfer to the held-out tasks (which stop the
    training, but are not trained on): see ``transfer``.

    Args:
        tasks: At least two; any number of layers, any candidates.
        held_out: Share of the tasks held out for early stopping.
        n_features: Number of outputs of the MLP.
        hidden: Width of its two hidden layers.
        max_epochs: Highest number of passes over the tasks.
        patience: Number of epochs without an improvement on the held-out tasks after which training stops.
        subset: Highest number of a task's trials per step; they are drawn anew each time, so that the prior learns to
            start from few.
        learning_rate: Learning rate of Adam.
        seed: Seed of initialisation, order and subsets.
        progress: Called with (epoch, held-out loss per trial) after each epoch.

    Returns:
        The prior of the epoch with the lowest held-out loss.

    Raises:
        ValueError: Fewer than two tasks, or one with fewer than two trials.
    """
    if len(tasks) < 2 or min(len(t.scores) for t in tasks) < 2:
        raise ValueError(f"meta-training needs at least two tasks of at least two trials, got {len(tasks)} tasks.")
    rng = np.random.default_rng(seed)
    held, trained = _split(tasks, held_out, rng)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        learner = _Learner(n_features, hidden)
    prepared = [_Prepared.of(task) for task in tasks]
    optimizer = torch.optim.Adam(learner.parameters(), lr=learning_rate)
    best, best_state, since = np.inf, learner.state_dict(), 0
    for epoch in range(max_epochs):
        for i in rng.permutation(trained):
            n = int(rng.integers(min(_FEWEST, len(prepared[i].targets)), min(subset, len(prepared[i].targets)) + 1))
            rows = rng.choice(len(prepared[i].targets), n, replace=False)
            optimizer.zero_grad()
            learner.loss(prepared[i], rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            some = [(prepared[i], np.arange(min(subset, len(prepared[i].targets)))) for i in held]
            loss = float(np.mean([float(learner.loss(task, rows)) for task, rows in some]))
        if progress is not None:
            progress(epoch, loss)
        if loss < best - _MIN_IMPROVEMENT:
            best, since = loss, 0
            best_state = {name: value.clone() for name, value in learner.state_dict().items()}
        else:
            since += 1
            if since >= patience:
                break
    learner.load_state_dict(best_state)
    prior = learner.export()
    return replace(prior, card=_card(tasks, [tasks[i] for i in held], prior))


def _split(tasks: Sequence[MetaTask], share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Returns the indices of the tasks to hold out and to train on: whole families, unless there is only one."""
    families = [task.family or i for i, task in enumerate(tasks)]
    if len(set(families)) == 1:
        families = list(range(len(tasks)))
    order = [int(i) for i in rng.permutation(len(tasks))]
    n_held = min(len(tasks) - 1, max(1, round(share * len(tasks))))
    chosen: list[Any] = []
    for i in order:
        size = sum(family in (*chosen, families[i]) for family in families)
        if families[i] not in chosen and size < len(tasks) and (not chosen or size <= n_held):
            chosen.append(families[i])
    return [i for i in order if families[i] in chosen], [i for i in order if families[i] not in chosen]


def _card(tasks: Sequence[MetaTask], held: Sequence[MetaTask], prior: Prior) -> dict[str, Any]:
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "tasks": [{"name": t.name, "layers": t.grid.n_layers, "trials": len(t.scores)} for t in tasks],
        "held_out": transfer(held, prior),
    }


def transfer(tasks: Sequence[MetaTask], prior: Prior, n_first: int = 8) -> dict[str, Any]:
    """Measures how well the rest of each task is predicted from its first few trials, with the prior and without.

    Args:
        tasks: Tasks that the prior was not trained on. Those with fewer than 6 trials are left out.
        prior: The prior.
        n_first: Number of trials to learn from; at most half of a task's trials are.

    Returns:
        ``n_first``; Spearman's rank correlation of predicted and actual scores ``with_prior`` and ``without``, means
        over the tasks, and their difference, ``gain`` (all None where no task is long enough); and ``tasks``, the same
        for each task.
    """
    found = []
    for task in tasks:
        if len(task.scores) < _FEWEST_MEASURED:
            continue
        n = min(n_first, len(task.scores) // 2)
        first, rest = slice(0, n), slice(n, None)
        row: dict[str, Any] = {"name": task.name}
        for key, used in (("with_prior", prior), ("without", None)):
            model = task.model(used)
            model.update(task.ranks[first], task.scores[first], task.points_of(first))
            predicted = model.predict(task.ranks[rest], task.points_of(rest))[0]
            row[key] = round(rank_correlation(predicted, task.scores[rest]), 4)
        found.append({**row, "gain": round(row["with_prior"] - row["without"], 4)})
    means = {
        key: round(float(np.mean([row[key] for row in found])), 4) if found else None
        for key in ("with_prior", "without", "gain")
    }
    return {"n_first": n_first, **means, "tasks": found}


@dataclass(frozen=True)
class _Prepared:
    """A task as tensors, in the notation above.

    Attributes:
        inputs: Inputs of the MLP, (n, L, 3).
        reference: Inputs of the MLP for the uniform configuration, (1, L, 3).
        kernel: X S X', (n, n).
        offset: X m, (n,).
        targets: y, (n,).
        doubt: v, (n,).
    """

    inputs: torch.Tensor
    reference: torch.Tensor
    kernel: torch.Tensor
    offset: torch.Tensor
    targets: torch.Tensor
    doubt: torch.Tensor

    @classmethod
    def of(cls, task: MetaTask) -> _Prepared:
        grid = task.grid
        plain = task.without_sensitivity().model(None)
        plain.update(task.ranks, task.scores, task.points)
        middle = plain.middle_hyperparameters()
        features = plain.features
        return cls(
            inputs=torch.from_numpy(mlp_inputs(grid, task.ranks)),
            reference=torch.from_numpy(mlp_inputs(grid, grid.reference[None])),
            kernel=torch.from_numpy((features * middle.std**2) @ features.T),
            offset=torch.from_numpy(features @ middle.mean),
            targets=torch.from_numpy(plain.targets),
            doubt=torch.from_numpy(plain.extra_variance),
        )


class _Learner(torch.nn.Module):
    """The MLP of a prior, and the mean and log standard deviation of its output weights."""

    def __init__(self, n_features: int, hidden: int) -> None:
        super().__init__()
        self._hidden = torch.nn.ModuleList(torch.nn.Linear(width, hidden, **_KIND) for width in (N_INPUTS, hidden))
        self._out = torch.nn.Linear(hidden, n_features, **_KIND)
        self.mean = torch.nn.Parameter(torch.zeros(n_features, **_KIND))
        self.log_std = torch.nn.Parameter(torch.zeros(n_features, **_KIND))

    def _features(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for linear in self._hidden:
            hidden = torch.tanh(linear(hidden))
        summed: torch.Tensor = self._out(hidden).sum(1)
        return summed / inputs.shape[1] ** 0.5

    def loss(self, task: _Prepared, rows: np.ndarray) -> torch.Tensor:
        features = self._features(task.inputs[rows]) - self._features(task.reference)
        covariance = task.kernel[rows][:, rows] + (features * (2 * self.log_std).exp()) @ features.T
        covariance = covariance + torch.diag(_NOISE**2 + task.doubt[rows])
        mean = task.offset[rows] + features @ self.mean
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, (task.targets[rows] - mean)[:, None], upper=False)
        penalty = _PENALTY * ((self.mean**2).sum() + (self.log_std**2).sum())
        return (penalty + 0.5 * (white**2).sum() + factor.diagonal().log().sum()) / len(rows)

    def export(self) -> Prior:
        state = {name: value.detach().numpy().copy() for name, value in self.state_dict().items()}
        layers = ("_hidden.0", "_hidden.1", "_out")
        return Prior(
            mlp=MLP([state[f"{n}.weight"].T for n in layers], [state[f"{n}.bias"] for n in layers]),
            mean=state["mean"],
            std=np.exp(state["log_std"]),
        )
