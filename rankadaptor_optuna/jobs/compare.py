"""Compare: the recommended ranks beside other ways to spend the same parameters, on the same recovery."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from rankadaptor_optuna.jobs.output import Results, bar, check_output_folder, write_text
from rankadaptor_optuna.jobs.results import (
    BUDGET_TOLERANCE,
    METHODS,
    NONE,
    OURS,
    UNIFORM,
    UNTRAINED,
    Comparison,
    Row,
    alike,
)
from rankadaptor_optuna.jobs.search import stored_recipe
from rankadaptor_optuna.objective import RecoveryObjective, examples_of
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.models import n_parameters
from rankadaptor_optuna.recovery.references import (
    adalora,
    adapter_parameters,
    eva,
    fisher_information,
    proportional_ranks,
)
from rankadaptor_optuna.studies.recommendation import recommend
from rankadaptor_optuna.studies.storage import open_storage
from rankadaptor_optuna.surrogate.statistics import t_interval
from rankadaptor_optuna.views.tables import as_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def compare(
    storage: str,
    study_name: str,
    out: Path,
    *,
    pruned: Path | None = None,
    seeds: int = 3,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Recovers with the recommended ranks and with the references, on fresh seeds, and writes a table and a picture.

    All train on the same data in the same order with the recipe's settings, and are scored on data, and items of tasks,
    that the search has not seen. Each keeps to the parameters of the uniform configuration. In ``out``:
    ``compare.json``, ``compare.md``, ``compare.png``; run again with the same settings it goes on.

    Args:
        storage: Optuna storage URL.
        study_name: A study with a recipe (``search``).
        out: Folder for the results.
        pruned: The pruned model, where it is at hand. Default: made anew as the recipe says.
        seeds: Fresh seeds.
        tasks: lm-eval tasks. Default: the recipe's; without any the loss is all that is measured.
        include_path: Folder of further task YAML files. Default: the recipe's.
        limit: At most so many items per task. Default: the recipe's ``report_limit``.
        say: Receives one line for each step.

    Returns:
        One row per method, in the order of ``METHODS``, and their paired differences.

    Raises:
        ValueError: There is no such study or task, or ``out`` belongs to other settings.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2 for an interval, got {seeds}.")
    recipe = stored_recipe(storage, study_name)
    study = optuna.load_study(study_name=study_name, storage=open_storage(storage))
    found = recommend(study)
    settings = {
        "recipe": recipe.to_dict(),
        "ranks": found.ranks.to_json(),
        "tasks": list(tasks),
        "limit": limit,
    }
    check_output_folder(out, settings)
    model, tokenizer = recipe.open_model(pruned) if pruned else recipe.read_model()[:2]
    job = recipe.objective(model, tokenizer, tasks=None)
    if sorted(map(str, job.space.modules)) != sorted(map(str, found.ranks)):
        raise ValueError(f"the layers of {pruned or recipe.model} are not those that study {study_name!r} searched.")
    given = {"tasks": tuple(tasks), "include_path": include_path, "limit": limit}
    suite = recipe.evaluation.suite(tokenizer, "report", **{name: value for name, value in given.items() if value})
    metric = recipe.evaluation.metric if not tasks else "loss"
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "settings.json", json.dumps(settings, indent=1))
    results = Results(out / "results.json")
    data = recipe.data
    report = examples_of(tokenizer, recipe.read_data().report, length=data.block_length, mask_prompt=data.mask_prompt)

    def measure(adapted: Any) -> dict[str, Any]:  # noqa: ANN401
        scores = suite.evaluate(adapted) if suite else []
        return {
            "scores": {metric: suite.weighted(scores, metric)} if suite and metric != "loss" else {},
            "loss": float(block_losses(adapted, report).mean()),
            "accuracies": {score.task: score.accuracy for score in scores},
            "parameters": adapter_parameters(adapted),
            "total_parameters": n_parameters(adapted),
        }

    rows = []
    fresh = tuple(1000 * (recipe.seed + 1) + i for i in range(seeds))
    for method in METHODS:
        say(f"{method}: {seeds if method not in UNTRAINED else 1} x {job.training.steps} steps")
        measured = []
        for seed in fresh[: 1 if method in UNTRAINED else None]:
            run = partial(_recover_and_measure, method, job, found.ranks, seed, measure)
            measured.append(results.get(f"{method}, seed {seed}", run))
        rows.append(_row(method, measured))
    comparison = Comparison(rows, settings, job.space.budget, fresh, found.ranks, job.space.uniform(), out)
    if comparison.over_budget:
        say(f"Over the budget of {job.space.budget:,.0f} parameters: {', '.join(comparison.over_budget)}")
    lines = table(rows)
    write_text(out / "compare.json", json.dumps({"settings": settings, "rows": [vars(r) for r in rows]}, indent=1))
    said = verdict(rows)
    write_text(out / "compare.md", as_markdown(lines) + "\n\n" + said + "\n")
    figure(rows).savefig(out / "compare.png", dpi=120)
    say(said)
    return comparison


def _recover_and_measure(
    method: str, job: RecoveryObjective, ranks: Ranks, seed: int, measure: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    if method == NONE:
        return {**measure(job.model), "seconds": 0.0}
    budget = (job.space.budget or math.inf) * BUDGET_TOLERANCE
    rank = next(iter(job.space.uniform().values()))
    while True:
        with bar(method, job.training.steps) as shown:
            start = time.perf_counter()
            with _recovered(method, job, ranks, rank, seed, lambda step, loss: shown.update(1)) as adapted:
                seconds = time.perf_counter() - start
                if rank == 1 or adapter_parameters(adapted) <= budget or method not in ("AdaLoRA", "EVA"):
                    return {**measure(adapted), "seconds": seconds}
        rank -= 1  # its allocation favours modules that cost more: less of it keeps to the budget


@contextmanager
def _recovered(
    method: str,
    job: RecoveryObjective,
    ranks: Ranks,
    rank: int,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Iterator[Any]:
    if method in ("AdaLoRA", "EVA"):
        recovery = adalora if method == "AdaLoRA" else eva
        with recovery(
            job.model, job.train, job.training, rank=rank, seed=seed, on_step=on_step, lora=job.lora
        ) as adapted:
            yield adapted
        return
    chosen = {UNIFORM: job.space.uniform(), OURS: ranks}.get(method) or fisher_ranks(job)
    job.on_step = on_step
    try:
        with job.recovered(chosen, seed=seed) as adapted:
            yield adapted
    finally:
        job.on_step = None


def fisher_ranks(job: RecoveryObjective) -> Ranks:
    """Ranks of the searched layers in proportion to their Fisher information, within the budget."""
    space = job.space
    shares = fisher_information(job.model, job.train, targets=job.lora.targets)
    layers = dict.fromkeys(space.layers, 0.0)
    for module, cost in zip(space.modules, space.costs, strict=True):
        layers[int(str(module).split(".")[0])] += cost
    found = proportional_ranks(
        {layer: shares[layer] for layer in layers}, layers, space.candidates, space.searched_budget
    )
    return Ranks({module: found[int(str(module).split(".")[0])] for module in space.modules})


def _row(method: str, measured: list[dict[str, Any]]) -> Row:
    return Row(
        method,
        [m["loss"] for m in measured],
        {task: [m["accuracies"][task] for m in measured] for task in measured[0]["accuracies"]},
        {metric: [m["scores"][metric] for m in measured] for metric in measured[0]["scores"]},
        max(m["parameters"] for m in measured),
        float(np.mean([m["seconds"] for m in measured])),
        max(m.get("total_parameters", 0) for m in measured),
    )


def _spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    mean = float(np.mean(values)) * scale
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    low, high = t_interval(np.asarray(values))
    return f"{mean:.{digits}f} ± {(high - low) / 2 * scale:.{digits}f}"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and a line per method: perplexity, scores, tasks, parameters, seconds; mean ± 95% t interval."""
    names = list(rows[0].accuracies)
    average = ["average"] if len(names) > 1 else []
    lines = [["recovery", "perplexity", *rows[0].scores, *names, *average, "trainable parameters", "seconds"]]
    for row in rows:
        scores = [_spread(values, digits=4) for values in row.scores.values()]
        scores += [_spread(row.accuracies[name], 100) for name in names]
        if average:
            scores.append(_spread(np.mean(list(row.accuracies.values()), axis=0).tolist(), 100))
        perplexity = _spread([math.exp(loss) for loss in row.losses])
        lines.append(
            [row.method, perplexity, *scores, f"{row.parameters:,}" if row.parameters else "-", f"{row.seconds:.0f}"]
        )
    return lines


def verdict(rows: Sequence[Row]) -> str:
    """What the paired differences say of RankAdaptor against each reference, wins and losses alike.

    Of what the search optimised, and in any case of the held-out loss.
    """
    by = {row.method: row for row in rows}
    said = []
    for method in METHODS[1:-1]:
        difference = np.asarray(by[OURS].losses) - np.asarray(by[method].losses)
        each = [f"{100 * math.expm1(x):+.2f}%" for x in (difference.mean(), *t_interval(difference))]
        said.append(_told(-difference, method, "perplexity", each))
    found = f"RankAdaptor, paired over {len(by[OURS].losses)} fresh seeds, is {'; '.join(said)}."
    for metric, ours in by[OURS].scores.items():
        said = []
        for method in METHODS[1:-1]:
            difference = np.asarray(ours) - np.asarray(by[method].scores[metric])
            each = [f"{x:+.4f}" for x in (difference.mean(), *t_interval(difference))]
            said.append(_told(difference, method, metric, each))
        found += f" By the {metric} that was searched on it is {'; '.join(said)}."
    return found


def _told(gains: NDArray[np.float64], method: str, what: str, each: Sequence[str]) -> str:
    if alike(gains) and gains[0] != 0:
        return f"not told apart from {method} ({each[0]} {what} with every seed, which leaves no spread to judge by)"
    low, high = t_interval(gains)
    word = "better than" if low > 0 else "WORSE than" if high < 0 else "not told apart from"
    return f"{word} {method} ({each[0]} {what}, 95% interval {each[1]} to {each[2]})"


def figure(rows: Sequence[Row]) -> Figure:
    """Perplexity of each method by seed, and its mean."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 3.5), layout="constrained")
    axes = drawn.subplots()
    recovered = [row for row in rows if row.method != NONE]
    for at, row in enumerate(recovered):
        values = [math.exp(loss) for loss in row.losses]
        axes.plot(values, [at] * len(values), "o", color="#0072B2" if row.method == OURS else "#8C8C8C")
        axes.plot([np.mean(values)], [at], "|", markersize=24, color="#E69F00")
    axes.set_yticks(range(len(recovered)), [row.method for row in recovered])
    axes.invert_yaxis()
    axes.set_xlabel("held-out perplexity: fresh seeds, and their mean")
    return drawn
