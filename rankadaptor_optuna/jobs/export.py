"""Export: the recommended configuration of a study, trained and written as files that anyone can use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna

from rankadaptor_optuna.jobs.output import bar, write_text
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import Exported
from rankadaptor_optuna.jobs.search import stored_recipe
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.studies.recommendation import Recommendation, recommend
from rankadaptor_optuna.studies.storage import masked, open_storage


def export(
    storage: str,
    study_name: str,
    out: Path,
    *,
    pruned: Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    merge: bool = False,
    say: Callable[[str], None] = print,
) -> Exported:
    """Trains the recommended configuration of a study and writes it.

    In ``out``: ``adapter/`` (PEFT), ``rank_pattern.json`` (arguments of ``peft.LoraConfig``), ``README.md`` (a model
    card with study, ranks, budget and scores) and, if asked for, ``merged/``, the model with the adapter merged in.

    Args:
        storage: Optuna storage URL.
        study_name: A study with a recipe (``search``).
        out: Folder to create.
        pruned: The pruned model, where it is at hand. Default: made anew as the recipe says.
        steps: Training steps. Default: the recipe's.
        seed: Of data order and initialisation. Default: the recipe's.
        merge: Whether to write the merged model.
        say: Receives one line for each step.

    Raises:
        ValueError: There is no such study, no finished trial or recipe in it, ``out`` is not empty, or the training
            failed.
    """
    from peft import PeftModel

    from rankadaptor_optuna.pruning.checkpoint import check_save_path, save_pruned

    check_save_path(out)
    recipe = stored_recipe(storage, study_name)
    if steps is not None:
        recipe = replace(recipe, training=replace(recipe.training, steps=steps, epochs=None))
    study = optuna.load_study(study_name=study_name, storage=open_storage(storage))
    found = recommend(study)
    model, tokenizer = recipe.open_model(pruned) if pruned else recipe.read_model()[:2]
    job = recipe.objective(model, tokenizer, tasks=None)
    if sorted(map(str, job.space.modules)) != sorted(map(str, found.ranks)):
        raise ValueError(f"the layers of {pruned or recipe.model} are not those that study {study_name!r} searched.")
    say(f"Training {job.training.steps} steps with the recommended ranks: {found.evidence.statement}")
    with bar("export", job.training.steps) as shown:
        job.on_step = lambda step, loss: shown.update(1)
        try:
            with job.recovered(found.ranks, seed=seed) as adapted:
                loss = float(block_losses(adapted, job.held_out).mean())
                out.mkdir(parents=True, exist_ok=True)
                adapted.save_pretrained(out / "adapter")
        except (RuntimeError, FloatingPointError) as error:  # out of memory is a RuntimeError
            raise ValueError(f"the training failed: {error}") from error
    tokenizer.save_pretrained(out / "adapter")
    arguments = job.space.with_fixed(found.ranks).lora_arguments(job.lora)
    write_text(out / "rank_pattern.json", json.dumps(arguments, indent=1))
    before = float(block_losses(job.model, job.held_out).mean())
    write_text(out / "README.md", _card(study_name, masked(storage), recipe, found, loss, before))
    if merge:
        save_pruned(PeftModel.from_pretrained(job.model, out / "adapter").merge_and_unload(), out / "merged", tokenizer)
    say(f"Held-out loss {loss:.4f} nats/token, {before:.4f} without recovery.")
    return Exported(found, recipe, study_name, masked(storage), loss, before, out)


def _card(study: str, storage: str, recipe: Recipe, found: Recommendation, loss: float, before: float) -> str:
    rows = [f"| {module} | {rank} |" for module, rank in found.ranks.items()]
    return "\n".join(
        [
            "---",
            "library_name: peft",
            f"base_model: {recipe.model}",
            "tags: [lora, pruning, rankadaptor]",
            "---",
            "",
            f"# LoRA recovery of {recipe.model}, with a rank per layer",
            "",
            f"Ranks from study `{study}` in `{storage}`: {found.evidence.n_trials} trials. {found.evidence.statement}",
            "",
            f"Held-out loss {loss:.4f} nats per token (perplexity {math.exp(loss):.2f}); without recovery {before:.4f} "
            f"({math.exp(before):.2f}). This is the text that the search scored its trials on.",
            "",
            f"Trainable parameters: {found.cost:,.0f} (budget {recipe.space.budget}).",
            "",
            "| layer | rank |",
            "| --- | --- |",
            *rows,
            "",
            "`rank_pattern.json` holds the arguments of `peft.LoraConfig`.",
            "",
            "## Recipe",
            "",
            "```json",
            json.dumps(recipe.to_dict(), indent=1),
            "```",
            "",
        ]
    )
