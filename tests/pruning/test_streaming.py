from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning.streaming import BlockStream


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


def test_blocks_run_one_by_one_compute_what_the_model_does(any_model, samples):
    stream = BlockStream(any_model, samples)
    with torch.no_grad():
        hidden = stream.embed()
        for index in range(len(stream.layers)):
            hidden = stream.advance(index, hidden)
        for i, sample in enumerate(samples):
            expected = any_model(input_ids=sample[None], labels=sample[None]).loss
            torch.testing.assert_close(stream.loss(i, hidden[i]), expected)


def test_token_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match=r"token id 300.*256 tokens"):
        BlockStream(model, torch.full((1, 4), 300))
