from __future__ import annotations

import copy

import pytest
import torch

from rankadaptor_optuna.recovery.data import token_blocks


def test_texts_are_packed_end_to_end_each_ended_by_the_end_token(tokenizer):
    end = tokenizer.eos_token
    blocks = token_blocks(tokenizer, ["abc", "defgh"], 5)
    assert blocks.shape == (2, 5)
    assert blocks.dtype is torch.int64
    assert ["".join(tokenizer.convert_ids_to_tokens(row)) for row in blocks] == [f"abc{end}d", f"efgh{end}"]


def test_the_last_incomplete_block_is_dropped(tokenizer):
    assert token_blocks(tokenizer, ["x" * 28], 10).shape == (2, 10)
    assert token_blocks(tokenizer, ["x" * 29], 10).shape == (3, 10)


def test_the_limit_takes_the_first_blocks(tokenizer, texts):
    every = token_blocks(tokenizer, texts, 16)
    assert len(every) > 3
    assert torch.equal(token_blocks(tokenizer, texts, 16, limit=3), every[:3])
    assert torch.equal(token_blocks(tokenizer, texts, 16, limit=10**6), every)


def test_any_iterable_of_texts_will_do(tokenizer, texts):
    assert torch.equal(token_blocks(tokenizer, iter(texts), 16), token_blocks(tokenizer, texts, 16))


def test_a_tokenizer_without_an_end_token_only_joins(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    assert tokenizer.decode(token_blocks(tokenizer, ["abc", "def"], 6)[0]) == "abcdef"


@pytest.mark.parametrize("texts", [[], [""], ["abc"]])
def test_too_little_text_is_refused_with_the_numbers(tokenizer, texts):
    with pytest.raises(ValueError, match=r"the text has \d tokens, too few for one block of 100; give more text"):
        token_blocks(tokenizer, texts, 100)
