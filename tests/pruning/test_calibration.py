from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning.calibration import draw_samples


def test_samples_are_distinct_windows_of_the_texts_and_depend_on_the_seed(tokenizer, texts):
    def draw(seed):
        return draw_samples(tokenizer, texts, n_samples=5, sample_length=20, seed=seed)

    joined = "".join(texts)
    windows = [tokenizer.decode(row) for row in draw(0)]
    assert draw(0).shape == (5, 20)
    assert len(set(windows)) == 5
    assert all(window in joined for window in windows)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(ValueError, match=r"holds 10 tokens, too few for 2 samples of 8"):
        draw_samples(tokenizer, ["hello", "world"], n_samples=2, sample_length=8, seed=0)


@pytest.mark.parametrize("texts", ["one string", [1, 2]])
def test_calibration_that_is_no_list_of_texts_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match="list of texts"):
        draw_samples(tokenizer, texts, n_samples=1, sample_length=4, seed=0)


def test_no_more_than_the_first_characters_of_a_long_text_are_read(tokenizer, monkeypatch):
    monkeypatch.setattr("rankadaptor_optuna.pruning.calibration._MOST_CHARACTERS", 30)
    with pytest.warns(UserWarning, match="only the first 30 characters of the calibration text are read"):
        windows = draw_samples(tokenizer, ["a" * 20, "b" * 100, "c"], n_samples=6, sample_length=5, seed=0)
    assert sorted(tokenizer.batch_decode(windows)) == ["aaaaa"] * 4 + ["bbbbb"] * 2
