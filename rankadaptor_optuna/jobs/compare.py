"""Compare: the recommended ranks beside other ways to spend the same parameters, on the same recovery."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.study import Study

from rankadaptor_optuna.jobs.inputs import Inputs, digest
from rankadaptor_optuna.jobs.output import OutputFolder, bar, write_json
from rankadaptor_optuna.jobs.recipe import Recipe, comparable
from rankadaptor_optuna.jobs.results import (
    COMPARED_METHODS,
    DENSE,
    FISHER,
    NONE,
    OURS,
    UNIFORM,
    UNTRAINED,
    Comparison,
    Row,
)
from rankadaptor_optuna.jobs.settings import Evaluation
from rankadaptor_optuna.jobs.stored import check_digests, check_modules, stored_study
from rankadaptor_optuna.llm.layers import layer_of
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.models import n_parameters
from rankadaptor_optuna.recovery.references import (
    adalora,
    adapter_parameters,
    check_adalora,
    differentiable_weights,
    eva,
    fisher_information,
    proportional_ranks,
)
from rankadaptor_optuna.studies.reading import study_space
from rankadaptor_optuna.studies.recommendation import recommend
from rankadaptor_optuna.studies.storage import check_same_settings

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.core import PrunedModel


def compare(
    storage: str,
    study_name: str | None,
    out: Path,
    *,
    pruned: Path | None = None,
    seeds: int = 3,
    methods: Sequence[str] = COMPARED_METHODS,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    trust_study: bool = False,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Recovers with the recommended ranks and with the references, on fresh seeds, and measures them.

    All train on the same data in the same order with the recipe's settings, and are scored on data, and items of tasks,
    that the search has not seen. No method exceeds the budget, which includes fixed layers. The results are in
    ``out/compare.json``; run again with the same settings, it measures only what is missing.

    Args:
        storage: Optuna storage URL.
        study_name: A study with a recipe (``search``). Default: the only such study.
        out: Folder for the results.
        pruned: Folder of the pruned model. Default: ``out/pruned``, pruned again as the recipe says.
        seeds: Number of fresh seeds.
        methods: Methods to compare, of ``COMPARED_METHODS`` and ``DENSE``, in the order of the rows.
        tasks: lm-eval tasks. Default: the recipe's for reports; without any, only the loss is measured.
        include_path: Folder of further task YAML files. Default: the recipe's.
        limit: Most items per task. Default: the recipe's ``report_limit``.
        trust_study: See ``stored_study``.
        say: Receives one line for each step.

    Raises:
        ValueError: There is no such study, method or task, the recovery is too short for a method, or ``out`` belongs
            to other settings.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2 for an interval, got {seeds}.")
    methods = tuple(dict.fromkeys([methods] if isinstance(methods, str) else methods))
    if not methods:
        raise ValueError(f"name at least one method to compare; there are {', '.join((DENSE, *COMPARED_METHODS))}.")
    if unknown := [method for method in methods if method not in (DENSE, *COMPARED_METHODS)]:
        raise ValueError(f"no method named {unknown[0]!r}; there are {', '.join((DENSE, *COMPARED_METHODS))}.")
    study, recipe = stored_study(storage, study_name, trust_study)
    evaluation = recipe.evaluation.for_report(tasks, include_path, limit)
    if "AdaLoRA" in methods and recipe.training.epochs is None:
        check_adalora(recipe.training)
    found, space = recommend(study), study_space(study)
    assert space is not None  # stored by the sampler of the first trial
    settings: dict[str, Any] = {"recipe": recipe.resolved().to_dict(), "tasks": list(tasks), "limit": limit}
    folder = OutputFolder(out, settings, partial(_read_settings, recipe=settings["recipe"]))
    ours = ",".join(map(str, found.ranks.values()))
    _name_ranks(folder)
    pruned = out / "pruned" if pruned is None and (out / "pruned").exists() else pruned
    bench = _Bench(recipe, evaluation, found.ranks, pruned, study, methods, folder)
    fresh = tuple(1000 * (recipe.seed + 1) + i for i in range(seeds))
    uniform, rows = space.uniform(), []
    for method in methods:
        say(f"{method}: measured once" if method in UNTRAINED else f"{method}: {seeds} recoveries")
        same = UNIFORM if method == OURS and found.ranks == uniform else method
        name = f"{same} {ours}" if same == OURS else same
        measured = [
            folder.measure(f"{name}, seed {seed}", partial(bench.recover_and_measure, same, seed))
            for seed in fresh[: 1 if method in UNTRAINED else None]
        ]
        rows.append(_row(method, measured))
    settings = {**settings, "ranks": found.ranks.to_json()}
    write_json(out / "compare.json", {"settings": settings, "rows": [vars(row) for row in rows]})
    return Comparison(rows, settings, space.budget, fresh, found.ranks, uniform, out)


def _read_settings(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of an earlier version in the current format, in which ranks are part of a measurement's key."""
    recipe = {"recipe": comparable(stored["recipe"], recipe)} if "recipe" in stored else {}
    return {key: value for key, value in {**stored, **recipe}.items() if key != "ranks"}


def _name_ranks(folder: OutputFolder) -> None:
    """Adds the ranks to the keys of an earlier version's measurements of the recommended ranks."""
    if ranks := folder.stored.get("ranks"):
        name = f"{OURS} {','.join(map(str, ranks.values()))},"
        folder.measured = {key.replace(f"{OURS},", name): value for key, value in folder.measured.items()}


_REPORT = "digest of the report data"


class _Bench:
    """The pruned model with the data of a comparison, loaded on first use: all may have been measured before."""

    def __init__(
        self,
        recipe: Recipe,
        evaluation: Evaluation,
        ranks: Ranks,
        pruned: Path | None,
        study: Study,
        methods: Sequence[str],
        folder: OutputFolder,
    ) -> None:
        self._recipe, self._evaluation, self._ranks = recipe, evaluation, ranks
        self._pruned, self._study, self._methods, self._folder = pruned, study, methods, folder

    @cached_property
    def _inputs(self) -> Inputs:
        inputs = Inputs(self._recipe, self._pruned)
        check_digests(self._study, inputs.digests())
        if "AdaLoRA" in self._methods:
            check_adalora(inputs.training)  # epochs have become steps
        return inputs

    @cached_property
    def _report(self) -> tuple[Any, Any]:
        """The report data as examples, and the tasks.

        Raises:
            ValueError: Earlier measurements in the output folder are of other data.
        """
        inputs, texts = self._inputs, self._inputs.parts.report
        examples = inputs.examples(texts, self._recipe.data.report_blocks)
        now, owner = {_REPORT: digest(examples)}, f"--out {self._folder.path}"
        was = {key: value for key, value in self._folder.measured.items() if key in now}
        check_same_settings(owner, was or now, now, "another --out")
        self._folder.measured |= now  # written with the next measurement
        return examples, self._evaluation.suite(inputs.tokenizer, "report", texts)

    @cached_property
    def _job(self) -> RecoveryObjective:
        job = self._inputs.objective(self._keep, tasks=None)
        check_modules(job, self._ranks, self._study.study_name, self._pruned or self._recipe.model)
        if FISHER in self._methods:
            differentiable_weights(job.model, job.lora.targets)  # refuses quantised weights before any recovery
        return job

    def _keep(self, model: Any, tokenizer: Any, pruned: PrunedModel | None) -> None:  # noqa: ANN401
        """Writes what was pruned here, for a run that goes on."""
        from rankadaptor_optuna.pruning.checkpoint import save_pruned

        if pruned is not None:
            self._folder.start()
            save_pruned(model, self._folder.path / "pruned", tokenizer)

    def recover_and_measure(self, method: str, seed: int) -> dict[str, Any]:
        _, job = self._report, self._job  # read before any training, as either may be refused
        if method == DENSE:
            return {**self._measure(self._recipe.open_dense()[0]), "seconds": 0.0}
        return _recover_and_measure(method, job, self._ranks, seed, self._measure)

    def _measure(self, model: Any) -> dict[str, Any]:  # noqa: ANN401
        (examples, suite), metric = self._report, self._evaluation.metric
        with bar("loss", len(examples)) as shown:
            losses = block_losses(model, examples, on_batch=lambda done: shown.update(done - shown.n))
        scores = []
        if suite:
            with bar("tasks", 0) as shown:
                scores = suite.evaluate(model, on_requests=shown.update)
        return {
            "scores": {metric: suite.weighted(scores, metric)} if suite and metric != "loss" else {},
            "loss": float(losses.mean()),
            "accuracies": {score.task: score.accuracy for score in scores},
            "parameters": adapter_parameters(model),
            "total_parameters": n_parameters(model),
        }


def _recover_and_measure(
    method: str, job: RecoveryObjective, ranks: Ranks, seed: int, measure: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    if method == NONE:
        return {**measure(job.model), "seconds": 0.0}
    with bar(method, job.training.steps) as shown:
        start = time.perf_counter()
        with _recovered(method, job, ranks, seed, lambda step, loss: shown.update(1)) as adapted:
            seconds = time.perf_counter() - start
            shown.close()
            return {**measure(adapted), "seconds": seconds}


@contextmanager
def _recovered(
    method: str,
    job: RecoveryObjective,
    ranks: Ranks,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Iterator[Any]:
    """Yields the recovered model; ``ranks`` are the recommended ranks."""
    if adaptive := _ADAPTIVE.get(method):
        budget = job.space.costliest if job.space.budget is None else min(job.space.budget, job.space.costliest)
        options = {"parameters": budget, "seed": seed, "on_step": on_step, "lora": job.lora}
        with adaptive(job.model, job.train, job.training, **options) as model:
            yield model
        return
    job.on_step = on_step
    try:
        allocated = _ALLOCATIONS[method](job, ranks)
        if not job.space.is_within_budget(job.space.cost(allocated)):
            raise ValueError(f"the ranks of {method} cost {job.space.cost(allocated):,.0f}, over the budget.")
        with job.recovered(allocated, seed=seed) as model:
            yield model
    finally:
        job.on_step = None


def fisher_ranks(job: RecoveryObjective) -> Ranks:
    """Returns ranks of the searched layers in proportion to their Fisher information, within the budget.

    They are integers from the smallest candidate to the largest: the candidates alone may leave much of the budget.
    """
    space = job.space
    shares = fisher_information(job.model, job.train, targets=job.lora.targets)
    layers = dict.fromkeys(space.layers, 0.0)
    for module, cost in zip(space.modules, space.costs, strict=True):
        layers[layer_of(module)] += cost
    found = proportional_ranks(
        {layer: shares[layer] for layer in layers},
        layers,
        range(space.candidates[0], space.candidates[-1] + 1),
        space.searched_budget,
    )
    return Ranks({module: found[layer_of(module)] for module in space.modules})


_ADAPTIVE: dict[str, Any] = {"AdaLoRA": adalora, "EVA": eva}  # methods that choose ranks by themselves
_ALLOCATIONS: dict[str, Callable[[RecoveryObjective, Ranks], Ranks]] = {
    UNIFORM: lambda job, recommended: job.space.uniform(),
    FISHER: lambda job, recommended: fisher_ranks(job),
    OURS: lambda job, recommended: recommended,
}


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
