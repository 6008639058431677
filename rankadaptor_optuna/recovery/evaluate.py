"""Evaluation of a recovered model: held-out loss, and tasks run by lm-eval."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankadaptor_optuna.recovery.data import IGNORED, Examples

if TYPE_CHECKING:
    import torch


def block_losses(
    model: Any,  # noqa: ANN401
    data: torch.Tensor | Examples,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Mean next-token loss of each block, or example, in nats per target; perplexity is the exponential of their mean.

    Args:
        model: A causal language model.
        data: Blocks of token ids, (n, length), or examples, whose prompts may be masked.
        batch_size: Blocks or examples per forward pass.
        on_batch: Called with the number of them that are done, after each pass.

    Returns:
        (n,), computed in float32 whatever the model's dtype.
    """
    import torch

    examples = data if isinstance(data, Examples) else Examples.of_blocks(data)
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        with torch.inference_mode():
            for start in range(0, len(examples), batch_size):
                batch = examples.batch(range(start, min(start + batch_size, len(examples))))
                inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
                targets = inputs.pop("labels")[:, 1:]
                logits = model(**inputs, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
                )
                losses += (loss.view(len(targets), -1).sum(1) / (targets != IGNORED).sum(1)).tolist()
                if on_batch is not None:
                    on_batch(len(losses))
    finally:
        model.train(was_training)
    return np.asarray(losses)


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one lm-eval task: length-normalised where the task has it, its standard error, items."""

    task: str
    accuracy: float
    stderr: float
    items: int


def continuation_items(texts: Sequence[str], n_items: int, seed: int = 0) -> list[dict[str, Any]]:
    """Multiple-choice items over running text: which of four passages follows the context?

    Args:
        texts: Where the items come from; those under 60 words are left out.
        n_items: How many, spread evenly over the texts.
        seed: Seed of the places and of the order of the choices.

    Returns:
        Records with ``context`` (16 words), ``choices`` (4 of 8 words; the wrong ones from other texts) and ``label``.

    Raises:
        ValueError: Fewer than four texts are long enough.
    """
    n_context, n_choice, n_choices = 16, 8, 4
    usable = [words for words in (text.split() for text in texts) if len(words) >= 60]
    if len(usable) < n_choices:
        raise ValueError(f"continuation items need {n_choices} texts of at least 60 words, got {len(usable)}.")
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
    """An lm-eval task configuration over ``continuation_items``, in memory: for ``evaluate_tasks``."""
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


def evaluate_tasks(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
    on_requests: Callable[[int], None] | None = None,
) -> list[TaskScore]:
    """Runs lm-eval tasks on a loaded model.

    Args:
        model: A causal language model, with or without an adapter attached.
        tokenizer: Its tokenizer.
        tasks: lm-eval task names, or task configurations.
        limit: At most so many items per task.
        batch_size: Requests per forward pass. Never "auto": on a CPU that tries 64 full-length sequences.
        include_path: Folder of further task YAML files.
        on_requests: Called with the number of sequences of each forward pass; lm-eval's own bars are hidden then.

    Returns:
        One score per task, in the order of lm-eval's results.

    Raises:
        ValueError: A task is unknown.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=False, include_path=include_path)
    if set(named) - set(manager.all_tasks):  # the index of lm-eval's own takes seconds
        manager = TaskManager(include_path=include_path)
    unknown = sorted(set(named) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"lm-eval knows no task named {', '.join(unknown)}; see `lm_eval ls tasks`.")

    class Reporting(HFLM):  # type: ignore[misc]
        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
            if on_requests is not None:
                on_requests(len(inps))
            return super()._model_call(inps, *args, **kwargs)

    was_training = model.training
    model.eval()
    hidden = nullcontext() if on_requests is None else redirect_stderr(StringIO())
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every loaded model handed to it
    try:
        with hidden:
            lm = Reporting(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            loaded = manager.load(list(tasks))
            found = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=0)
    finally:
        model.train(was_training)
        logger.setLevel(level)
    return [_score(name, found) for name in found["results"]]


def _score(name: str, found: Any) -> TaskScore:  # noqa: ANN401
    result = found["results"][name]
    metric = next(m for m in ("acc_norm,none", "acc,none", "exact_match,none") if m in result)
    accuracy, items = float(result[metric]), int(found["n-samples"][name]["effective"])
    return TaskScore(name, accuracy, float(np.sqrt(accuracy * (1 - accuracy) / items)), items)
