from __future__ import annotations

import numpy as np
import pytest
import torch

from rankadaptor_optuna.recovery.data import IGNORED, Examples
from rankadaptor_optuna.recovery.evaluate import block_losses


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_of_each_block_is_transformers_own(model, blocks, batch_size):
    with torch.no_grad():
        expected = [float(model(input_ids=block[None], labels=block[None]).loss) for block in blocks]
    assert block_losses(model, blocks, batch_size) == pytest.approx(expected, rel=1e-5)


def test_losses_are_computed_in_float32_whatever_the_model(model, blocks):
    exact = block_losses(model, blocks)
    losses = block_losses(model.to(torch.bfloat16), blocks)
    assert losses.dtype == np.float64
    assert losses == pytest.approx(exact, rel=0.02)
    assert any(float(x) != float(torch.tensor(x).bfloat16()) for x in losses)


def test_scoring_reports_progress_and_leaves_the_models_mode(model, blocks):
    done = []
    model.train()
    block_losses(model, blocks, 2, on_batch=done.append)
    assert done == [2, 4, 5]
    assert model.training


def test_dropout_is_off_while_scoring(make_model, blocks):
    model = make_model(attention_dropout=0.9).train()
    assert (block_losses(model, blocks) == block_losses(model, blocks)).all()


def test_the_loss_of_an_example_counts_its_targets_alone(model):
    ids = [torch.arange(n) * 5 % 256 for n in (9, 4)]
    labels = [torch.cat([torch.full((2,), IGNORED), row[2:]]) for row in ids]
    with torch.no_grad():
        expected = [float(model(input_ids=i[None], labels=t[None]).loss) for i, t in zip(ids, labels, strict=True)]
    assert block_losses(model, Examples(ids, labels)) == pytest.approx(expected, rel=1e-5)
