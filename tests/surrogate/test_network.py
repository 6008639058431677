from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rankadaptor_optuna.surrogate.network import Network


def test_training_is_torchs_adam_on_the_papers_network():
    hidden = (32, 16, 32)
    rng = np.random.default_rng(0)
    inputs, targets, weights = rng.standard_normal((16, 10)), rng.standard_normal(16), rng.random(16)
    network, sizes = Network(10, hidden, seed=0), [10, *hidden, 1]
    linears = [torch.nn.Linear(n, m, dtype=torch.float64) for n, m in itertools.pairwise(sizes)]
    reference = torch.nn.Sequential(*[part for linear in linears for part in (linear, torch.nn.ReLU())][:-1])
    start = 0
    for linear in linears:
        n, m = linear.in_features, linear.out_features
        flat = torch.from_numpy(network.parameters[start : start + (n + 1) * m].copy())
        linear.weight.data, linear.bias.data = flat[: n * m].reshape(n, m).T.clone(), flat[n * m :]
        start += (n + 1) * m
    assert start == len(network.parameters)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for _ in range(20):
        network.step(inputs, targets, weights)
        optimizer.zero_grad()
        out = reference(torch.from_numpy(inputs))[:, 0]
        (torch.from_numpy(weights) * (out - torch.from_numpy(targets)) ** 2).mean().backward()
        optimizer.step()
    assert network(inputs) == pytest.approx(reference(torch.from_numpy(inputs))[:, 0].detach().numpy(), abs=1e-9)


def test_the_networks_start_is_torchs_default():
    network = Network(10, seed=0)
    first, second = network.parameters[: 11 * 32], network.parameters[11 * 32 : 11 * 32 + 33 * 32]
    assert np.abs(first).max() == pytest.approx(10**-0.5, rel=0.05)
    assert np.abs(second).max() == pytest.approx(32**-0.5, rel=0.05)
