from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning.gradients import Gradients, evaluation_mode
from rankadaptor_optuna.pruning.streaming import BlockStream


@pytest.fixture
def samples():
    return torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(2))


def walked(model, samples, wanted, **settings):
    seen = {}
    with evaluation_mode(model):
        ends = settings.pop("ends", None)
        Gradients(BlockStream(model, samples), **settings).walk(wanted, lambda i, g: seen.update({i: g}), ends=ends)
    return seen


def test_block_by_block_the_gradients_are_those_of_one_backward_pass(any_model, samples):
    names = [name for name, _ in any_model.model.layers[0].named_parameters()]
    ends = {name: any_model.get_parameter(name) for name in ("model.norm.weight", "lm_head.weight")}
    seen = walked(any_model, samples, dict.fromkeys(range(4), names), ends=ends)
    assert list(seen) == [4, 3, 2, 1, 0]
    any_model(input_ids=samples, labels=samples).loss.backward()
    for index in range(4):
        for name in names:
            expected = any_model.model.layers[index].get_parameter(name).grad
            torch.testing.assert_close(seen[index][name].mean, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        seen[4]["model.norm.weight"].mean, any_model.model.norm.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_head_and_embedding_have_their_own_gradients_even_when_tied(make_model, samples):
    for tied in (False, True):
        model = make_model(tie_word_embeddings=tied)
        ends = {name: model.get_parameter(name) for name in ("lm_head.weight", "model.embed_tokens.weight")}
        seen = walked(model, samples, {}, ends=ends)
        both = [seen[4]["lm_head.weight"].mean, seen[-1]["model.embed_tokens.weight"].mean]
        model(input_ids=samples, labels=samples).loss.backward()
        if tied:
            both = [sum(both)]
        for found, parameter in zip(both, [model.lm_head.weight, model.model.embed_tokens.weight], strict=False):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_one_blocks_gradients_are_held_at_a_time(model, samples):
    """Nothing of the last block's gradients is alive when the first's are there."""
    import weakref

    held, alive = [], []

    def visit(index, gradients):
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(gradients["mlp.up_proj.weight"].mean))

    with evaluation_mode(model):
        Gradients(BlockStream(model, samples)).walk(dict.fromkeys(range(4), ("mlp.up_proj.weight",)), visit)
    assert alive[1:] == [0, 0, 0]
