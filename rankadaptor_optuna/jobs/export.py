"""Export: the recommended configuration of a study, trained and written for PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankadaptor_optuna.checks.folders import check_writable
from rankadaptor_optuna.database.connections import masked
from rankadaptor_optuna.jobs.output import bar, write_json
from rankadaptor_optuna.jobs.results import Exported
from rankadaptor_optuna.jobs.stored import load_pruned_job, stored_study
from rankadaptor_optuna.llm.layers import modules_of
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.studies.recommendation import recommend

if TYPE_CHECKING:
    from rankadaptor_optuna.pruning.core import PrunedModel


def export(
    storage: str,
    study_name: str | None,
    out: Path,
    *,
    pruned: Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    merge: bool = False,
    trust_study: bool = False,
    say: Callable[[str], None] = print,
) -> Exported:
    """Trains the recommended configuration of a study and writes it.

    In ``out``: ``adapter/`` (PEFT), ``rank_pattern.json`` (arguments of ``peft.LoraConfig``), ``pruned/``, the pruned
    model, unless it is given, and, if asked for, ``merged/``, the model with the adapter merged in. The adapter names
    the pruned model by its absolute path, or by its name on the Hub.

    Args:
        storage: Optuna storage URL.
        study_name: A study with a recipe (``search``). Default: the only such study.
        out: Folder to create.
        pruned: Folder of the pruned model. Default: ``out/pruned`` if an earlier export was interrupted, else pruned
            again as the recipe says.
        steps: Training steps. Default: the recipe's.
        seed: Seed of data order and initialisation. Default: the recipe's.
        merge: Whether to write the merged model.
        trust_study: See ``stored_study``.
        say: Receives one line for each step.

    Raises:
        ValueError: There is no such study, no finished trial or recipe in it, it recommends no adapter, ``out`` is not
            empty, or the training failed.
    """
    from peft import PeftModel

    from rankadaptor_optuna.pruning.checkpoint import check_save_path, remove_unfinished, save_pruned, unfinished

    check_writable(out)
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    own = out / "pruned"
    there = {path.name for path in out.glob("*")} - {"adapter.part", *(path.name for path in unfinished(own))}
    if there == {"pruned"}:
        pruned = pruned or own
    elif there or not out.is_dir():
        check_save_path(out)
    study, recipe = stored_study(storage, study_name, trust_study)
    if steps is not None:
        recipe = replace(recipe, training=replace(recipe.training, steps=steps, epochs=None))
    found = recommend(study)
    if not any(found.all_ranks.values()):
        raise ValueError(f"study {study.study_name!r} recommends rank 0 in every layer: there is no adapter to train.")

    def keep(model: Any, tokenizer: Any, result: PrunedModel | None) -> None:  # noqa: ANN401
        nonlocal pruned
        if result is not None:
            remove_unfinished(own)
            save_pruned(model, own, tokenizer)
            pruned = own

    job = load_pruned_job(recipe, pruned, found.ranks, study, keep)
    base = _absolute(pruned or job.model.name_or_path)
    say(f"Training {job.training.steps} steps with the recommended ranks: {found.evidence.statement}")
    loss, before = train_adapter(job, found.ranks, out / "adapter", base=base, seed=seed)
    write_json(out / "rank_pattern.json", job.space.with_fixed(found.ranks).lora_arguments(job.lora))
    if merge:
        adapted = PeftModel.from_pretrained(job.model, out / "adapter")
        save_pruned(adapted.merge_and_unload(), out / "merged", job.tokenizer)
    worse = " The recovery made the model WORSE." if loss > before else ""
    say(f"Held-out loss {loss:.4f} nats/token, {before:.4f} without recovery.{worse}")
    return Exported(found, recipe, study.study_name, masked(storage), loss, before, base, out)


def train_adapter(
    job: RecoveryObjective, ranks: Ranks, folder: Path, *, base: str, seed: int | None = None
) -> tuple[float, float]:
    """Recovers with these ranks and writes the adapter and the tokenizer, completely or not at all.

    Args:
        job: The trial objective.
        ranks: Ranks of the searched modules.
        folder: Folder of the adapter; replaced.
        base: The pruned model, for the adapter's configuration: absolute path of its folder, or Hub name.
        seed: Seed of data order and initialisation. Default: the objective's.

    Returns:
        (loss on the validation data, the same without recovery), nats per target token.

    Raises:
        ValueError: The training failed.
    """
    scratch = folder.with_name(folder.name + ".part")
    with bar("adapter", job.training.steps) as shown:
        job.on_step = lambda step, loss: shown.update(1)
        try:
            with job.recovered(ranks, seed=seed) as adapted:
                loss = float(block_losses(adapted, job.held_out).mean())
                config = adapted.peft_config["default"]
                config.base_model_name_or_path = base
                _adapt_further_layers(config, job, ranks)
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.parent.mkdir(parents=True, exist_ok=True)
                adapted.save_pretrained(scratch)
        except (RuntimeError, FloatingPointError) as error:  # out of memory is a RuntimeError
            raise ValueError(f"the training failed: {error}") from error
        finally:
            job.on_step = None
    job.tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return loss, float(block_losses(job.model, job.held_out).mean())


def _absolute(model: str | Path) -> str:
    """Returns the absolute path of a model's folder; a Hub name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def _adapt_further_layers(config: Any, job: RecoveryObjective, ranks: Ranks) -> None:  # noqa: ANN401
    """Makes the adapter's configuration name layers beyond the model's last one, too.

    A model with more layers, such as the dense one, then lacks weights for them, and PEFT says so.
    """
    space, targets = job.space, job.lora.targets
    if any("*" in target for target in targets):  # the modules are listed by their full names
        further = {target.replace(".*.", f".{space.n_layers}.", 1) for target in targets}
        config.target_modules = {*config.target_modules, *further}
        return
    adapted = space.with_fixed(ranks).adapted
    absent = [module for module in modules_of(range(space.n_layers), space.granularity) if module not in adapted]
    patterns = Ranks.uniform(absent, 1).rank_pattern
    config.layers_to_transform = config.layers_pattern = None
    config.exclude_modules = rf"(.*\.)?({'|'.join(patterns)})" if patterns else None
