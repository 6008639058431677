"""Evaluates models on lm-eval tasks: builds the requests once and computes shared contexts once."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import numpy as np

Part = Literal["all", "search", "report"]
Metric = Literal["loss", "margin", "accuracy"]
_METRICS = ("acc_norm", "acc", "exact_match")  # in order of preference
_FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class TaskScore:
    """Score of a model on one task.

    Attributes:
        task: Name of the task.
        accuracy: Length-normalised accuracy if the task has it, else accuracy; exact match for a generating task.
        stderr: Standard error of the accuracy.
        items: Number of items.
        margin: Mean over the items of the log-likelihood of the right choice less that of the best wrong choice, in
            nats per character. Each log-likelihood is divided by the choice's length if the accuracy is
            length-normalised, else by the mean length of the choices, so the margin of an item is positive if and only
            if the item counts as right. None for a task without choices.
    """

    task: str
    accuracy: float
    stderr: float
    items: int
    margin: float | None


@dataclass
class _Item:
    """One document of a task.

    Attributes:
        doc: The document.
        requests: Its requests, one per choice first.
        right: Indices of the right choices; None for a generating task.
        lengths: Divisor of each choice's log-likelihood, in characters.
    """

    doc: Any
    requests: list[Any]
    right: list[int] | None
    lengths: list[float]

    def margin(self, answers: Sequence[tuple[float, bool]]) -> float | None:
        """Returns the margin of the answers to the requests; None without choices."""
        if self.right is None:
            return None
        scores = [answers[i][0] / n for i, n in enumerate(self.lengths)]
        wrong = [score for i, score in enumerate(scores) if i not in self.right]
        return max(scores[i] for i in self.right) - max(wrong) if wrong else None


class TaskSuite:
    """lm-eval tasks, loaded and turned into requests once, on which many models are evaluated.

    The documents of each task are split into a half for searching and a half for reporting, independent of the limit.
    Scores equal lm-eval's up to rounding; a context that choices share is computed once.

    Args:
        tokenizer: The models' tokenizer.
        tasks: lm-eval task, group or tag names, or task configurations; with weights, ``{name: weight}``.
        part: ``"search"`` or ``"report"``, disjoint halves of each task's documents, or ``"all"``.
        limit: Largest number of items of each task; for a group, of each of its tasks.
        num_fewshot: Examples before each item, unless the task's configuration sets 0. Default: the task's number.
        include_path: Folder of more task YAML files. Default: none.
        batch_size: Requests per forward pass; requests with a shared context count by their tokens.

    Attributes:
        weights: Weight of each task, summing to 1.
        generating: Names of the tasks without choices, which have no margin.

    Raises:
        ValueError: A task is unknown, its data cannot be loaded or is too small to split, it has no accuracy, or a
            weight is not positive.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401
        tasks: Sequence[str | dict[str, Any]] | Mapping[str, float],
        *,
        part: Part = "all",
        limit: int | None = None,
        num_fewshot: int | None = None,
        include_path: str | None = None,
        batch_size: int = 8,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        if not tasks:
            raise ValueError("tasks must not be empty: name at least one lm-eval task.")
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._agreeing: dict[Any, bool] = {}
        with _silent_lm_eval():
            self._built = {
                name: [(leaf, _items(leaf, part, limit, num_fewshot)) for leaf in leaves]
                for name, leaves in _load(list(tasks), include_path).items()
            }
        weights = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(self._built, 1.0)
        if any(not weight > 0 for weight in weights.values()):
            raise ValueError(f"weights of tasks must be positive, got {weights}.")
        total = sum(weights.values())
        self.weights = {name: weights[name] / total for name in self._built}
        self.generating = [
            name for name, leaves in self._built.items() if any(i.right is None for _, items in leaves for i in items)
        ]

    def _requests(self, kind: str) -> list[Any]:
        items = (item for leaves in self._built.values() for _, items in leaves for item in items)
        return [request for item in items for request in item.requests if request.request_type == kind]

    def evaluate(
        self,
        model: Any,  # noqa: ANN401
        on_requests: Callable[[int], None] | None = None,
    ) -> list[TaskScore]:
        """Scores a model on each task, in the order given.

        Args:
            model: A causal language model, with or without an adapter attached.
            on_requests: Called with the number of requests of each forward pass.
        """
        from rankadaptor_optuna.recovery.shared_context import SharedContextLM

        was_training = model.training
        model.eval()
        try:
            with _silent_lm_eval():
                lm = SharedContextLM(pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size)
                lm.on_requests, lm.agreeing = on_requests, self._agreeing
                for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                    requests = [request for request in self._requests(kind) for _ in range(request.repeats)]
                    for request in requests:
                        request.resps, request.filtered_resps = [], {}
                    if requests:
                        answers = getattr(lm, kind)(requests, disable_tqdm=True)
                        for request, answer in zip(requests, answers, strict=True):
                            request.resps.append(answer)
        finally:
            model.train(was_training)
        return [self._score(name) for name in self._built]

    def _score(self, name: str) -> TaskScore:
        right: list[float] = []
        margins: list[float] = []
        for task, items in self._built[name]:
            task.apply_filters()
            chosen = task._filters[0].name  # the first filter (gsm8k: strict-match)
            for item in items:
                answers = [request.filtered_resps[chosen] for request in item.requests]
                metrics = task.process_results(item.doc, answers)
                right.append(float(next(metrics[metric] for metric in _METRICS if metric in metrics)))
                if (margin := item.margin(answers)) is not None:
                    margins.append(margin)
        accuracy, n = float(np.mean(right)), len(right)
        mean = float(np.mean(margins)) if margins else None
        return TaskScore(name, accuracy, float(np.sqrt(accuracy * (1 - accuracy) / n)), n, mean)

    def weighted(self, scores: Sequence[TaskScore], metric: Literal["accuracy", "margin"]) -> float:
        """Returns the weighted mean over the tasks; the margin's is over the tasks that have one."""
        values = {score.task: getattr(score, metric) for score in scores}
        weights = {name: self.weights[name] for name, value in values.items() if value is not None}
        return float(sum(weight * values[name] for name, weight in weights.items()) / sum(weights.values()))


@contextmanager
def _silent_lm_eval() -> Iterator[None]:
    """Hides lm-eval's progress bars and its warning about every model that is passed to it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _name(task: str | dict[str, Any]) -> str:
    return task if isinstance(task, str) else str(task["task"])


def check_names(names: Collection[str], include_path: str | None = None) -> None:
    """Checks that lm-eval knows some tasks, without loading their data.

    Raises:
        ValueError: It does not; the message names them.
    """
    if names:
        with _silent_lm_eval():
            _manager(set(names), include_path)


def _manager(names: set[str], include_path: str | None) -> Any:  # noqa: ANN401
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=include_path)
    if names - set(manager.all_tasks):  # indexing lm-eval's own tasks takes seconds
        manager = TaskManager(include_path=include_path)
    if unknown := sorted(names - set(manager.all_tasks)):
        raise ValueError(f"lm-eval knows no task named {', '.join(unknown)}; see `lm_eval ls tasks`.")
    return manager


def _load(tasks: list[str | dict[str, Any]], include_path: str | None) -> dict[Any, list[Any]]:
    """Loads the lm-eval tasks of each name; a group or a tag stands for several."""
    import datasets

    manager = _manager({task for task in tasks if isinstance(task, str)}, include_path)
    found = {}
    for task in tasks:
        try:
            found[_name(task)] = list(manager.load([task])["tasks"].values())
        except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the data of task {_name(task)} cannot be loaded ({reason}).") from error
    return found


def _items(task: Any, part: Part, limit: int | None, num_fewshot: int | None) -> list[_Item]:  # noqa: ANN401
    """Builds the requests of a part of a task's documents."""
    if not set(_METRICS) & set(task.aggregation()):
        raise ValueError(f"task {task.config.task} has none of the metrics {', '.join(_METRICS)}; name another task.")
    if num_fewshot is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    n, name = len(task.eval_docs), task.config.task
    ids = np.arange(n)
    if part != "all":
        if n < 2:
            raise ValueError(f"task {name} has {n} documents, too few to split.")
        ids = np.random.default_rng(zlib.crc32(name.encode())).permutation(n)[part == "report" :: 2]
    task.build_all_requests(samples=sorted(ids[:limit].tolist()))
    grouped: dict[int, list[Any]] = {}
    for request in task.instances:
        grouped.setdefault(request.doc_id, []).append(request)
    return [_item(task, sorted(requests, key=lambda request: request.idx)) for requests in grouped.values()]


def _item(task: Any, requests: list[Any]) -> _Item:  # noqa: ANN401
    doc = requests[0].doc
    if task.OUTPUT_TYPE != "multiple_choice":
        return _Item(doc, requests, None, [])
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    # lengths are those of the scored continuations, which differ from the choices if these are contexts (winogrande);
    # requests beyond the choices score these without their context (acc_mutual_info)
    lengths = [max(1.0, len(request.args[1].strip())) for request in requests[: len(choices)]]
    if "acc_norm" not in task.aggregation():
        lengths = [sum(lengths) / len(lengths)] * len(lengths)
    return _Item(doc, requests, [choices.index(g) if isinstance(g, str) else g for g in golds], lengths)


def continuation_items(texts: Sequence[str], n_items: int, seed: int = 0) -> list[dict[str, Any]]:
    """Makes multiple-choice items from running text: which of four passages follows the context?

    Args:
        texts: Source texts; texts of fewer than 60 words are left out.
        n_items: Number of items, spread evenly over the texts.
        seed: Seed of the positions and of the order of the choices.

    Returns:
        Records with ``context`` (16 words), ``choices`` (4 of 8 words; the wrong ones from other texts) and ``label``.

    Raises:
        ValueError: Fewer than four texts are long enough.
    """
    n_context, n_choice, n_choices, least = 16, 8, 4, 60  # set by hand
    usable = [words for words in (text.split() for text in texts) if len(words) >= least]
    if len(usable) < n_choices:
        raise ValueError(f"continuation items need {n_choices} texts of at least {least} words, got {len(usable)}.")
    rng = np.random.default_rng(seed)

    def passage(words: list[str], start: int) -> str:
        return " ".join(words[start : start + n_choice])

    items = []
    for i in range(n_items):
        words = usable[i % len(usable)]
        start = int(rng.integers(len(words) - n_context - n_choice + 1))
        others = rng.choice([j for j in range(len(usable)) if j != i % len(usable)], n_choices - 1, replace=False)
        choices = [passage(words, start + n_context)]
        choices += [passage(usable[j], int(rng.integers(len(usable[j]) - n_choice + 1))) for j in others]
        order = rng.permutation(n_choices).tolist()
        items.append(
            {
                "context": " ".join(words[start : start + n_context]),
                "choices": [choices[j] for j in order],
                "label": order.index(0),
            }
        )
    return items


def continuation_task(items: Sequence[dict[str, Any]], name: str = "continuation") -> dict[str, Any]:
    """Returns an in-memory lm-eval task configuration of ``continuation_items``, for ``TaskSuite``."""
    import datasets

    rows = datasets.Dataset.from_list(list(items))
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }
