"""Offline meta-learning of the paper's network (section 3.2): joint pretraining, and Reptile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankadaptor_optuna.priors.meta import MetaTask
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.network import HIDDEN, Network
from rankadaptor_optuna.surrogate.paper import BATCH, network_inputs
from rankadaptor_optuna.surrogate.statistics import standardise


def pretrain(tasks: Sequence[MetaTask], *, hidden: Sequence[int] = HIDDEN, steps: int = 2000, seed: int = 0) -> Network:
    """Pretrains one network on several tasks (the paper's offline meta-learning, section 3.2).

    Args:
        tasks: At least one, all with the same number of layers: the network's input is the rank vector.
        hidden: Widths of the three hidden layers.
        steps: Number of gradient steps, each on up to 16 trials of one task, drawn anew; the default is set by hand.
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
    """Learns an initialisation from which few trials suffice: Reptile (Nichol et al., 2018, algorithm 1).

    Where ``pretrain`` fits all tasks at once, Reptile moves the initialisation towards the network adapted to a few
    trials of one task at a time: ``start += step size * (adapted - start)``, with a step size that falls to 0.

    Args:
        tasks: See ``pretrain``.
        hidden: Widths of the three hidden layers.
        iterations: Number of moves, each by one task; this default and those below are set by hand.
        inner_steps: Number of gradient steps that adapt to a task's trials.
        shots: Number of the task's trials, drawn anew each time.
        step_size: Step size of the first move.
        seed: Seed of initialisation, tasks and trials.

    Raises:
        ValueError: See ``pretrain``.
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
    """Returns an untrained network, and each task's inputs and standardised scores."""
    widths = sorted({task.grid.n_layers for task in tasks})
    if len(widths) != 1 or min(len(task.scores) for task in tasks) == 0:
        raise ValueError(f"meta-learning needs tasks with trials, all of one number of layers, got layers {widths}.")
    prepared = [(network_inputs(task.grid, task.ranks), standardise(task.scores).targets) for task in tasks]
    return Network(widths[0], hidden, seed), prepared


def _batch(rows: tuple[Array, Array], size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Returns up to ``size`` of the rows at random, without replacement."""
    inputs, targets = rows
    chosen = rng.choice(len(targets), min(size, len(targets)), replace=False)
    return inputs[chosen], targets[chosen]
