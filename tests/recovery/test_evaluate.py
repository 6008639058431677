from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from rankadaptor_optuna.recovery.data import IGNORED, Examples
from rankadaptor_optuna.recovery.evaluate import block_losses, continuation_items, continuation_task, evaluate_tasks


@pytest.fixture(scope="module")
def passages():
    """Texts of words that say where they stand: 'text.position'."""
    return [" ".join(f"{i}.{j}" for j in range(60 + 10 * i)) for i in range(6)]


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


def test_items_have_a_context_and_four_choices_with_the_true_continuation_at_the_label(passages):
    items = continuation_items(passages, 40)
    assert len(items) == 40
    for i, item in enumerate(items):
        context = item["context"].split()
        text, start = (int(x) for x in context[0].split("."))
        assert text == i % 6
        assert context == [f"{text}.{start + j}" for j in range(len(context))]
        right = item["choices"][item["label"]]
        assert right.split() == [f"{text}.{start + len(context) + j}" for j in range(8)]
        wrong = [c for c in item["choices"] if c != right]
        assert [len(c.split()) for c in wrong] == [8] * 3
        assert len({c.split(".")[0] for c in wrong} - {str(text)}) == 3  # from three other texts
    assert {item["label"] for item in items} == {0, 1, 2, 3}
    assert len({len(item["context"].split()) for item in items}) == 1


def test_items_are_fixed_by_the_seed(passages):
    assert continuation_items(passages, 8) == continuation_items(passages, 8)
    assert continuation_items(passages, 8) != continuation_items(passages, 8, seed=1)


def test_short_texts_are_left_out_and_four_long_ones_needed(passages):
    short = " ".join(["word"] * 59)
    assert all("word" not in item["context"] for item in continuation_items([short, *passages], 12))
    with pytest.raises(ValueError, match="need 4 texts of at least 60 words, got 3"):
        continuation_items([short, *passages[:3]], 12)


def test_lm_eval_scores_a_model_on_the_continuation_task(make_model, tokenizer, passages):
    model, requests = make_model(max_position_embeddings=512).train(), []
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    level = logging.getLogger("lm_eval").level
    task = continuation_task(continuation_items(passages, 6))
    (score,) = evaluate_tasks(model, tokenizer, [task], on_requests=requests.append)
    assert (score.task, score.items) == ("continuation", 6)
    assert 0 <= score.accuracy <= 1
    assert score.accuracy * 6 == pytest.approx(round(score.accuracy * 6))
    assert score.stderr == pytest.approx((score.accuracy * (1 - score.accuracy) / 6) ** 0.5)
    assert sum(requests) == 4 * 6
    assert model.training
    assert logging.getLogger("lm_eval").level == level
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_limit_and_a_model_that_knows_the_answer_count(make_model, tokenizer, passages):
    """A model that repeats one byte prefers the choice made of that byte."""
    model = make_model(max_position_embeddings=512)
    byte = tokenizer("x")["input_ids"][0]
    items = [{"context": "a b", "choices": ["y" * 8, "x" * 8, "z" * 8, "w" * 8], "label": 1}] * 5
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokenizer("a b xxx")["input_ids"]])).last_hidden_state
        model.lm_head.weight.zero_()
        model.lm_head.weight[byte] = 10 * hidden.mean((0, 1))
    (score,) = evaluate_tasks(model, tokenizer, [continuation_task(items, "known")], limit=3)
    assert (score.task, score.items, score.accuracy, score.stderr) == ("known", 3, 1.0, 0.0)


def test_an_unknown_task_is_named(model, tokenizer, tmp_path, monkeypatch):
    import lm_eval.tasks

    class Small(lm_eval.tasks.TaskManager):  # the index of all tasks takes seconds
        def __init__(self, **kwargs):
            super().__init__(**kwargs | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Small)
    with pytest.raises(ValueError, match="lm-eval knows no task named nonsense_task; see `lm_eval ls tasks`"):
        evaluate_tasks(model, tokenizer, ["nonsense_task"])


def test_the_loss_of_an_example_counts_its_targets_alone(model):
    ids = [torch.arange(n) * 5 % 256 for n in (9, 4)]
    labels = [torch.cat([torch.full((2,), IGNORED), row[2:]]) for row in ids]
    with torch.no_grad():
        expected = [float(model(input_ids=i[None], labels=t[None]).loss) for i, t in zip(ids, labels, strict=True)]
    assert block_losses(model, Examples(ids, labels)) == pytest.approx(expected, rel=1e-5)
