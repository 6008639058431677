"""Offline meta-learning of the paper's MLP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.network import HIDDEN, Network
from rankadaptor_optuna.surrogate.paper import BATCH, network_inputs
from rankadaptor_optuna.surrogate.statistics import standardise


def pretrain(tasks: Sequence[MetaTask], *, hidden: Sequence[int] = HIDDEN, steps: int = 2000, seed: int = 0) -> Network:
    """The paper's offline meta-learning: one network trained on several tasks, a fresh set of trials each step.

    Args:
        tasks: At least one, all with the same number of layers: the network takes the rank vector itself.
        hidden: Widths of the three hidden layers.
        steps: Number of gradient steps, each on up to 16 trials of one task.
        seed: Seed of initialisation, tasks and trials.

    Raises:
        ValueError: No task, tasks of different depth or without a trial, or ``hidden`` is not three positive widths.
    """
    network, prepared = _start(tasks, hidden, seed)
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        network.step(*_batch(prepared[rng.integers(len(prepared))], BATCH, rng))
    network.restart_optimizer()
    return network


def reptile(
    tasks: Sequence[MetaTask],
    *,
    hidden: Sequence[int] = HIDDEN,
    iterations: int = 400,
    inner_steps: int = 20,
    shots: int = 10,
    step_size: float = 0.5,
    seed: int = 0,
) -> Network:
    """An initialisation that learns fast: Reptile (Nichol et al., 2018), first-order meta-learning.

    Where ``pretrain`` fits all tasks at once, this moves the initialisation towards where a few of a task's trials
    take it, one task at a time: ``start += step size * (adapted - start)``, the step size falling to 0.

    Args:
        tasks: As for ``pretrain``.
        hidden: Widths of the three hidden layers.
        iterations: Number of moves, each by one task.
        inner_steps: Gradient steps that adapt to a task's trials.
        shots: So many of its trials, drawn anew each time.
        step_size: Size of the first move, as a share.
        seed: Seed of initialisation, tasks and trials.

    Raises:
        ValueError: As ``pretrain``.
    """
    network, prepared = _start(tasks, hidden, seed)
    rng = np.random.default_rng([seed, 1])
    for i in range(iterations):
        adapted = network.copy()
        few = _batch(prepared[rng.integers(len(prepared))], shots, rng)
        for _ in range(inner_steps):
            adapted.step(*_batch(few, BATCH, rng))
        network.parameters += step_size * (1 - i / iterations) * (adapted.parameters - network.parameters)
    return network


def _start(tasks: Sequence[MetaTask], hidden: Sequence[int], seed: int) -> tuple[Network, list[tuple[Array, Array]]]:
    """An untrained network, and each task's inputs and standardised scores."""
    widths = sorted({task.grid.n_layers for task in tasks})
    if len(widths) != 1 or min(len(task.scores) for task in tasks) == 0:
        raise ValueError(f"meta-learning needs tasks with trials, all of one number of layers, got layers {widths}.")
    prepared = [(network_inputs(task.grid, task.ranks), standardise(task.scores).targets) for task in tasks]
    return Network(widths[0], hidden, seed), prepared


def _batch(rows: tuple[Array, Array], size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """So many of the rows at random, without replacement, all where there are fewer."""
    inputs, targets = rows
    chosen = rng.choice(len(targets), min(size, len(targets)), replace=False)
    return inputs[chosen], targets[chosen]
