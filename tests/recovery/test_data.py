from __future__ import annotations

import copy

import pytest
import torch

from rankadaptor_optuna.recovery.data import (
    IGNORED,
    Examples,
    alpaca_prompt,
    examples_of,
    instruction_examples,
    prompt_and_response,
    token_blocks,
)


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


END = "\0"  # what the end token's byte reads as


def test_a_record_becomes_alpacas_prompt_and_its_response_ended_by_the_end_token(tokenizer):
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    examples = instruction_examples(tokenizer, [record], 1000)
    text = tokenizer.decode(examples.ids[0])
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert text.endswith(f"### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3{END}")
    targets = examples.labels[0] != IGNORED
    assert tokenizer.decode(examples.ids[0][targets]) == f"3{END}"
    assert torch.equal(examples.labels[0][targets], examples.ids[0][targets])
    without = alpaca_prompt({"instruction": "Add.", "input": ""})
    assert "Input" not in without
    assert without.startswith("Below is an instruction that describes a task. Write")


def test_without_a_mask_every_token_is_a_target(tokenizer):
    examples = instruction_examples(tokenizer, [{"instruction": "A", "output": "B"}], 1000, mask_prompt=False)
    assert torch.equal(examples.labels[0], examples.ids[0])


def test_examples_are_cut_off_and_those_without_a_target_are_dropped(tokenizer):
    short, long = {"instruction": "A", "output": "B" * 50}, {"instruction": "A" * 300, "output": "B"}
    with pytest.warns(
        UserWarning, match="of 3 records, 1 have no response within 200 tokens and are left out, and 0 are"
    ):
        examples = instruction_examples(tokenizer, [short, long, short], 200)
    with pytest.warns(
        UserWarning, match="of 2 records, 0 have no response within 180 tokens and are left out, and 2 are"
    ):
        instruction_examples(tokenizer, [short, short], 180)
    assert [len(ids) for ids in examples.ids] == [len(alpaca_prompt(short)) + 51] * 2
    assert len(instruction_examples(tokenizer, [short] * 9, 200, limit=4)) == 4
    with pytest.raises(ValueError, match="no record has a response within 200 tokens"):
        instruction_examples(tokenizer, [long], 200)


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\0{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]


def test_messages_follow_the_chat_template_and_the_last_reply_is_the_target(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHATML
    examples = instruction_examples(chatting, [{"messages": TURNS}], 1000)
    assert tokenizer.decode(examples.ids[0]) == f"<system>S{END}<user>Hi{END}<assistant>Ho{END}"
    assert tokenizer.decode(examples.ids[0][examples.labels[0] != IGNORED]) == f"Ho{END}"
    plain = instruction_examples(tokenizer, [{"messages": TURNS}], 1000)
    assert tokenizer.decode(plain.ids[0]).endswith(f"### Instruction:\nS\n\nHi\n\n### Response:\nHo{END}")


def test_a_completion_follows_its_prompt(tokenizer):
    examples = instruction_examples(tokenizer, [{"prompt": "1 + 2 =", "completion": " 3"}], 1000)
    assert tokenizer.decode(examples.ids[0]) == f"1 + 2 = 3{END}"
    assert tokenizer.decode(examples.ids[0][examples.labels[0] != IGNORED]) == f" 3{END}"


def test_a_limit_reads_no_more_text_than_it_needs(tokenizer, texts, monkeypatch):
    monkeypatch.setattr("rankadaptor_optuna.recovery.data._BATCH", 100)
    seen = []
    counting = lambda batch, **settings: seen.extend(batch) or tokenizer(batch, **settings)  # noqa: E731
    counting.eos_token_id = tokenizer.eos_token_id
    blocks = token_blocks(counting, texts, 16, limit=3)
    assert len(seen) < len(texts)
    assert torch.equal(blocks, token_blocks(tokenizer, texts, 16)[:3])


def test_a_record_without_a_field_is_refused_by_name(tokenizer):
    for record in ({"instruction": "A", "answer": "B"}, {"instruction": "A", "output": None, "answer": "B"}):
        with pytest.raises(ValueError, match=r"a record has no output, but instruction, (output, )?answer"):
            instruction_examples(tokenizer, [record], 100)


def test_a_batch_is_padded_with_ignored_labels_and_masked_only_where_needed():
    a, b = torch.arange(5), torch.arange(3)
    batch = Examples([a, b], [a, b]).batch([0, 1])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert "attention_mask" not in Examples([a, a], [a, a]).batch([0, 1])


def test_micro_batches_hold_examples_of_like_length():
    ids = [torch.zeros(n) for n in (3, 9, 4, 8, 1)]
    assert Examples(ids, ids).by_length(range(5), 2) == [[1, 3], [2, 0], [4]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one text " * 100, "data must be a list of texts or records, got one str"),
        ({"text": ["a column"] * 9}, "data must be a list of texts or records, got one dict"),
        (["a text " * 9, None], "item 2 of the data is a NoneType"),
        (["a text " * 9, 3], "item 2 of the data is a int"),
        (["", " \n"] * 50, "the data holds no text"),
        (["a text", {"prompt": "a", "completion": "b"}], "not some of each"),
    ],
)
def test_data_that_is_no_list_of_texts_or_records_is_refused(tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        examples_of(tokenizer, data, length=8, mask_prompt=True)


def test_texts_may_come_from_a_generator_or_as_records(tokenizer, texts):
    expected = examples_of(tokenizer, texts, length=8, mask_prompt=True)
    for data in (iter(texts), [{"text": text, "id": i} for i, text in enumerate(texts)]):
        found = examples_of(tokenizer, data, length=8, mask_prompt=True)
        assert torch.equal(torch.stack(list(found.ids)), torch.stack(list(expected.ids)))


def test_lengths_and_tokenizers_that_cannot_work_are_refused(tokenizer, texts):
    with pytest.raises(ValueError, match="block_length must be at least 2"):
        examples_of(tokenizer, texts, length=1, mask_prompt=True)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        examples_of(tokenizer, texts, length=8, mask_prompt=True, limit=0)
    with pytest.raises(ValueError, match="tokenizer must be of transformers"):
        examples_of("gpt2", texts, length=8, mask_prompt=True)


def test_a_chat_template_that_refuses_a_conversation_is_one_line(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"refuses a conversation of system, user.*System role not supported"):
        prompt_and_response(strict, {"messages": TURNS})


def test_a_chat_template_whose_prompt_is_no_start_of_the_conversation_is_not_used_unsaid(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<ai>' if add_generation_prompt }}"
    with pytest.warns(UserWarning, match="Alpaca's prompt is used instead"):
        _, response = prompt_and_response(odd, {"messages": TURNS})
    assert response == "Ho"


def test_a_conversation_ends_with_the_assistant(tokenizer):
    with pytest.raises(ValueError, match="must end with the assistant, got 'user'"):
        prompt_and_response(tokenizer, {"messages": TURNS[:2]})
    with pytest.raises(ValueError, match="must have a role and a content"):
        prompt_and_response(tokenizer, {"messages": "Hi"})
