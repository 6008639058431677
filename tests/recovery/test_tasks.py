from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rankadaptor_optuna.recovery.tasks import TaskScore, TaskSuite, continuation_items, continuation_task


@pytest.fixture(scope="module")
def passages():
    """Texts of words that say where they stand: 'text.position'."""
    return [" ".join(f"{i}.{j}" for j in range(60 + 10 * i)) for i in range(6)]


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
    (score,) = TaskSuite(tokenizer, [task]).evaluate(model, on_requests=requests.append)
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
    (score,) = TaskSuite(tokenizer, [continuation_task(items, "known")], limit=3).evaluate(model)
    assert (score.task, score.items, score.accuracy, score.stderr) == ("known", 3, 1.0, 0.0)
    assert score.margin > 0


def test_an_unknown_task_is_named(tokenizer, monkeypatch):
    import lm_eval.tasks

    class Small(lm_eval.tasks.TaskManager):  # the index of all tasks takes seconds
        def __init__(self, **kwargs):
            super().__init__(**kwargs | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Small)
    with pytest.raises(ValueError, match="lm-eval knows no task named nonsense_task; see `lm_eval ls tasks`"):
        TaskSuite(tokenizer, ["nonsense_task"])


def choice_task(name, n=13, **settings):
    """A multiple choice of words of differing length, some of them right."""
    draw = np.random.default_rng(0)
    words = ["rank", "a", "layer", "pruned", "head", "of models"]
    rows = [
        {"q": f"{i} " + " ".join(draw.choice(words, 3)), "options": list(draw.permutation(words)[:3]), "gold": i % 3}
        for i in range(n)
    ]
    splits = {"test": datasets.Dataset.from_list(rows), "train": datasets.Dataset.from_list(rows[::-1])}
    return {
        "task": name,
        "custom_dataset": lambda **_: splits,
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        **settings,
    }


def lm_evals_own(model, tokenizer, task, **settings):
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[task],
        task_manager=manager,
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        **settings,
    )
    return found["results"][task["task"]], found["samples"][task["task"]]


@pytest.fixture
def long_model(make_model):
    return make_model(max_position_embeddings=512)


@pytest.mark.parametrize("settings", [{}, {"limit": 5, "num_fewshot": 2}])
def test_accuracy_is_lm_evals_own_and_the_margin_is_that_of_its_answers(long_model, tokenizer, settings):
    task = choice_task("words")
    expected, samples = lm_evals_own(long_model, tokenizer, task, **settings)
    suite = TaskSuite(tokenizer, [task], **settings)
    for _ in range(2):  # what was built once serves again
        (score,) = suite.evaluate(long_model)
        assert score.accuracy == pytest.approx(expected["acc_norm,none"])
        margins = []
        for sample in samples:
            each = [r[0] / len(c) for r, c in zip(sample["filtered_resps"], sample["doc"]["options"], strict=True)]
            margins.append(each.pop(sample["target"]) - max(each))
        assert score.margin == pytest.approx(np.mean(margins), abs=1e-5)
        assert np.mean([m > 0 for m in margins]) == pytest.approx(score.accuracy)
        assert score.items == len(samples)


def test_where_accuracy_is_plain_a_positive_margin_is_still_a_right_answer(long_model, tokenizer):
    plain = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    suite = TaskSuite(tokenizer, [choice_task("words", 60, metric_list=plain)])
    (score,) = suite.evaluate(long_model)
    margins = [
        item.margin([request.filtered_resps["none"] for request in item.requests])
        for item in suite._built["words"][0][1]
    ]
    assert np.mean([m > 0 for m in margins]) == pytest.approx(score.accuracy)
    by_length = TaskSuite(tokenizer, [choice_task("words", 60)])._built["words"][0][1]
    answers = [[request.filtered_resps["none"] for request in item.requests] for item in suite._built["words"][0][1]]
    normalised = [item.margin(each) for item, each in zip(by_length, answers, strict=True)]
    assert [m > 0 for m in normalised] != [m > 0 for m in margins]  # so it matters which


def test_requests_are_built_once_however_many_models_are_evaluated(make_model, tokenizer, monkeypatch):
    from lm_eval.api.task import Task

    built, real = [], Task.build_all_requests
    monkeypatch.setattr(
        Task, "build_all_requests", lambda self, **kw: built.append(self.config.task) or real(self, **kw)
    )
    suite = TaskSuite(tokenizer, [choice_task("words"), choice_task("more")])
    scores = [suite.evaluate(make_model(initializer_range=r)) for r in (0.05, 0.2, 0.05)]
    assert built == ["words", "more"]
    assert scores[0] == scores[2] != scores[1]


def documents(suite):
    return {request.arguments[0] for request in suite._requests("loglikelihood")}


@pytest.mark.parametrize("limit", [None, 2, 4])
def test_items_to_search_and_to_report_on_never_meet_whatever_the_limits(tokenizer, limit):
    task = choice_task("words")
    search = documents(TaskSuite(tokenizer, [task], part="search", limit=limit))
    report = documents(TaskSuite(tokenizer, [task], part="report"))
    assert len(search) == min(limit or 7, 7)
    assert len(report) == 6
    assert not search & report
    assert search <= documents(TaskSuite(tokenizer, [task], part="search"))
    assert search == documents(TaskSuite(tokenizer, [task], part="search", limit=limit))


def test_choices_that_are_contexts_compare_the_same_continuation(long_model, tokenizer):
    """As in winogrande: the blank is filled in, and what follows is scored."""
    rows = datasets.Dataset.from_list(
        [{"fill": ["a rank", "the layers of it"], "rest": f" is number {i}", "gold": i % 2} for i in range(6)]
    )
    task = {
        **choice_task("blanks", n=3),
        "custom_dataset": lambda **_: {"test": rows, "train": rows},
        "doc_to_text": lambda doc: doc["gold"],
        "doc_to_choice": lambda doc: doc["fill"],
        "doc_to_target": lambda doc: doc["rest"].strip(),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    expected, _ = lm_evals_own(long_model, tokenizer, task)
    suite = TaskSuite(tokenizer, [task])
    (score,) = suite.evaluate(long_model)
    assert score.accuracy == pytest.approx(expected["acc,none"])
    found = [item.margin([(0.0, False), (-11.0, False)]) for item in suite._built["blanks"][0][1]]
    assert found == [11 / len("is number 0"), -11 / len("is number 0")] * 3


def test_a_task_that_generates_has_an_exact_match_and_no_margin(long_model, tokenizer):
    task = {
        **choice_task("say", n=4),
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{q}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    suite = TaskSuite(tokenizer, [task, choice_task("words")])
    scores = suite.evaluate(long_model)
    assert (scores[0].accuracy, scores[0].margin, scores[0].items) == (0.0, None, 4)
    assert suite.weighted(scores, "accuracy") == pytest.approx(scores[1].accuracy / 2)
    assert suite.generating == ["say"]
    assert suite.weighted(scores, "margin") == pytest.approx(scores[1].margin)


def test_the_mean_over_tasks_is_by_their_weights(tokenizer, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"q": "a"}\n' * 4)
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/{name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 0\n"
            "doc_to_choice: [b, c]\n"
        )
    suite = TaskSuite(tokenizer, {"one": 3, "two": 1.0}, include_path=str(tmp_path))
    scores = [TaskScore("one", 0.5, 0.1, 4, 0.2), TaskScore("two", 1.0, 0.0, 4, -0.2)]
    assert suite.weights == {"one": 0.75, "two": 0.25}
    assert suite.weighted(scores, "accuracy") == pytest.approx(0.625)
    assert suite.weighted(scores, "margin") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ([], {}, "name at least one"),
        ([choice_task("words")], {"limit": 0}, "limit must be at least 1, got 0"),
        ([choice_task("words", n=1)], {"part": "search"}, "task words has 1 documents, too few to split"),
        (
            [choice_task("words", metric_list=[{"metric": "mcc", "aggregation": "mcc", "higher_is_better": True}])],
            {},
            "task words has none of the metrics acc_norm, acc, exact_match",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tokenizer, tasks, settings, message):
    with pytest.raises(ValueError, match=message):
        TaskSuite(tokenizer, tasks, **settings)


def test_a_task_whose_data_cannot_be_had_is_named(tokenizer, tmp_path):
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 0\ndoc_to_choice: [b, c]\n"
    )
    with pytest.raises(ValueError, match="the data of task gone cannot be loaded"):
        TaskSuite(tokenizer, {"gone": 1.0}, include_path=str(tmp_path))
