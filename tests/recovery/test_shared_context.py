from __future__ import annotations

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.shared_context import SharedContextLM


def choices(n_items=5, context=(1, 30), continuation=(1, 9)):
    """Token requests of items with two to four choices, then two that stand alone."""
    draw = np.random.default_rng(0)

    def tokens(bounds):
        return draw.integers(0, 256, draw.integers(*bounds)).tolist()

    items = [(tokens(context), [tokens(continuation) for _ in range(2 + i % 3)]) for i in range(n_items)]
    items += [(tokens(context), [tokens(continuation)]) for _ in range(2)]
    return [(("", ""), before, after) for before, several in items for after in several]


def shared(model, tokenizer, batch_size=4):
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    lm.agreeing = {}
    return lm


def run(lm, requests):
    """Answers, and the (rows, length) of each forward pass."""
    shapes = []
    noting = lm.model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    with noting:
        answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return answers, shapes


def both(model, tokenizer, requests):
    """Answers in shared contexts, HFLM's, and whether the former were trusted."""
    lm = shared(model, tokenizer)
    theirs, _ = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), requests)
    ours, _ = run(lm, requests)
    return ours, theirs, list(lm.agreeing.values())


def assert_same(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for (score, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(expected, abs=tolerance)
        assert greedy is expected_greedy


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_hflms_in_every_family(any_model, tokenizer, attention):
    any_model.set_attn_implementation(attention)
    ours, theirs, trusted = both(any_model, tokenizer, choices(n_items=12))  # some of which fit mistral's window
    assert_same(ours, theirs)
    assert trusted == [True]


def test_answers_are_hflms_of_a_pruned_model_with_an_adapter(model, tokenizer, texts):
    pruned = prune(model, tokenizer, ratio=0.2, calibration=texts).model
    with attached(pruned, lora_config({1: 2, 2: 4}), seed=0) as adapted:
        adapted.eval()
        plain, _, _ = both(adapted, tokenizer, choices())
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        ours, theirs, trusted = both(adapted, tokenizer, choices())
    assert_same(ours, theirs)
    assert trusted == [True]
    assert ours[0][0] != pytest.approx(plain[0][0], abs=0.01)  # the adapter counts


def test_answers_in_bfloat16_are_as_close_as_its_rounding(model, tokenizer):
    ours, theirs, trusted = both(model.to(torch.bfloat16), tokenizer, choices())
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=0.03)
    assert trusted == [True]


def test_a_continuation_that_the_model_would_write_is_greedy(model, tokenizer):
    context = [5, 6, 7]
    written = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    other = [*written[:2], (written[2] + 1) % 256]
    requests = [(("", ""), context, tokens) for tokens in (other, written, written[:1])]
    ours, theirs, _ = both(model, tokenizer, requests)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] == [False, True, True]


def test_what_is_cut_to_fit_the_model_is_cut_as_hflm_does(make_model, tokenizer):
    model = make_model(max_position_embeddings=24)
    requests = choices(context=(12, 30))
    assert len({len(before) + len(after) > 25 for _, before, after in requests}) == 2
    ours, theirs, _ = both(model, tokenizer, requests)
    assert_same(ours, theirs)


def test_a_shared_context_is_forwarded_once_and_no_pass_holds_more_than_hflms(model, tokenizer):
    requests = choices(context=(20, 30))[:-2]
    lm = shared(model, tokenizer)
    run(lm, requests)  # compares one group
    _, ours = run(lm, requests)
    _, theirs = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), requests)
    ours, theirs = ([rows * length for rows, length in shapes] for shapes in (ours, theirs))
    assert sum(ours) < 0.6 * sum(theirs)
    assert max(ours) <= max(theirs)


def test_contexts_that_differ_are_left_to_hflm(model, tokenizer):
    requests = choices()[-2:]
    lm = shared(model, tokenizer)
    assert run(lm, requests) == run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), requests)
    assert lm.agreeing == {}


def ignores_the_mask(forward):
    return lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)


def takes_ids_alone(forward):
    return lambda input_ids: forward(input_ids)


@pytest.mark.parametrize("change", [ignores_the_mask, takes_ids_alone])
def test_a_model_that_answers_otherwise_is_left_to_hflm_for_good(model, tokenizer, change):
    model.forward = change(model.forward)
    lm, requests = shared(model, tokenizer), choices()
    theirs = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), requests)
    answers, _ = run(lm, requests)
    assert answers == theirs[0]
    assert run(lm, requests) == theirs


def test_attention_that_takes_no_mask_of_ours_is_left_to_hflm(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert shared(model, tokenizer)._groups(choices()) == []


def test_each_request_is_reported_once(model, tokenizer):
    reported, requests = [], choices()
    lm = shared(model, tokenizer)
    lm.on_requests = reported.append
    run(lm, requests)
    assert sum(reported) == len(requests)
    assert len(reported) > 2


def test_rolling_likelihoods_are_hflms_to_the_bit(model, tokenizer):
    texts = ("of the head " * 20, "a layer", "a rank")
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    lm = shared(model, tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    assert lm.loglikelihood_rolling(requests) == theirs.loglikelihood_rolling(requests)
    assert lm.agreeing == {}
