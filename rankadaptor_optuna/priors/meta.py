"""Offline meta-learning: the MLP's features and its weights' prior, from many tasks (one study each).

Maximises the marginal likelihood of every task's scores under the Bayesian head, jointly over the MLP and the mean and
spread of its output weights, as in adaptive Bayesian linear regression (Perrone et al., 2018). The paper meta-learns a
plain MLP (section 3.2, "offline meta-learning"): ``surrogate.paper.pretrain`` and ``reptile`` do.
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

MAX_EPOCHS = 200
_NOISE = 0.2
_KIND: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's defaults are


@dataclass(frozen=True)
class MetaTask:
    """One finished study.

    Attributes:
        grid: Its layers.
        ranks: Ranks of each trial, (n, L).
        scores: Their scores, (n,), higher is better, on any scale.
        points: The other parameters in the unit cube, (n, E). Default: there are none.
        name: Its name, for the card.
        family: What it has in common with related tasks (the model, say), which are held out together. Default: the
            task is alone.
    """

    grid: RankGrid
    ranks: Array
    scores: Array
    points: Array | None = None
    name: str = ""
    family: str = ""

    def model(self, prior: Prior | None) -> BayesianModel:
        """A performance model of its search space that has seen nothing."""
        return BayesianModel(self.grid, prior=prior, n_ordinary=0 if self.points is None else self.points.shape[1])

    def untold(self) -> MetaTask:
        """The same task, its layers' sensitivities unknown."""
        return replace(self, grid=replace(self.grid, sensitivity=np.zeros(self.grid.n_layers)))

    def points_of(self, rows: slice) -> Array | None:
        """The other parameters of some trials."""
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
    """Learns a prior from tasks, stopped early on tasks held out.

    What tasks know of their layers' sensitivities is not looked at: where it is known there is little left to learn,
    and what is learned beside it does not hold where it is not.

    The prior's card says from which tasks, when, and how well it transfers to those held out (which stop the training,
    but are not trained on): see ``transfer``.

    Args:
        tasks: At least two; any number of layers, any candidates.
        held_out: Share of the tasks held out for early stopping.
        n_features: Outputs of the MLP.
        hidden: Width of its two hidden layers.
        max_epochs: Most passes over the tasks.
        patience: Epochs without an improvement on the held-out tasks before it stops.
        subset: Most trials of a task per step, drawn anew each time, so that it learns to start from few.
        learning_rate: Adam's learning rate.
        seed: Seed of initialisation, order and subsets.
        progress: Called with (epoch, held-out negative log evidence per trial).

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
            n = int(rng.integers(min(4, len(prepared[i].targets)), min(subset, len(prepared[i].targets)) + 1))
            rows = rng.choice(len(prepared[i].targets), n, replace=False)
            optimizer.zero_grad()
            learner.loss(prepared[i], rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            some = [(prepared[i], np.arange(min(subset, len(prepared[i].targets)))) for i in held]
            loss = float(np.mean([float(learner.loss(task, rows)) for task, rows in some]))
        if progress is not None:
            progress(epoch, loss)
        if loss < best - 1e-4:
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
    """Tasks to hold out and to train on, by index: whole families, unless there is but one."""
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
    """How well the rest of each task is predicted from its first few trials, with the prior and without.

    Args:
        tasks: Tasks that the prior was not trained on. Those with fewer than 6 trials are passed over.
        prior: The prior.
        n_first: So many trials are learned from, half of a task's trials at most.

    Returns:
        ``n_first``; Spearman's rank correlation of predicted and actual scores ``with_prior`` and ``without``, means
        over the tasks, and their difference, ``gain`` (None where no task is long enough); ``tasks``, the same by task.
    """
    found = []
    for task in tasks:
        if len(task.scores) < 6:
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
    """A task as tensors: MLP inputs, the kernel of the head's other features, standardised scores."""

    inputs: torch.Tensor
    reference: torch.Tensor
    kernel: torch.Tensor
    offset: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, task: MetaTask) -> _Prepared:
        grid = task.grid
        plain = task.untold().model(None)
        plain.update(task.ranks, task.scores, task.points)
        middle = plain.middle_hyperparameters()
        features = plain.features
        return cls(
            inputs=torch.from_numpy(mlp_inputs(grid, task.ranks)),
            reference=torch.from_numpy(mlp_inputs(grid, grid.reference[None])),
            kernel=torch.from_numpy((features * middle.std**2) @ features.T),
            offset=torch.from_numpy(features @ middle.mean),
            targets=torch.from_numpy(plain.targets),
        )


class _Learner(torch.nn.Module):
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
        covariance = covariance + _NOISE**2 * torch.eye(len(rows), **_KIND)
        mean = task.offset[rows] + features @ self.mean
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, (task.targets[rows] - mean)[:, None], upper=False)
        penalty = 1e-3 * ((self.mean**2).sum() + (self.log_std**2).sum())  # keeps unused outputs finite
        return (penalty + 0.5 * (white**2).sum() + factor.diagonal().log().sum()) / len(rows)

    def export(self) -> Prior:
        state = {name: value.detach().numpy().copy() for name, value in self.state_dict().items()}
        layers = ("_hidden.0", "_hidden.1", "_out")
        return Prior(
            mlp=MLP([state[f"{n}.weight"].T for n in layers], [state[f"{n}.bias"] for n in layers]),
            mean=state["mean"],
            std=np.exp(state["log_std"]),
        )
