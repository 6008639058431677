"""Export: the recommended configuration of a study, trained and written for PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rankadaptor_optuna.database import masked
from rankadaptor_optuna.jobs.output import bar, write_json
from rankadaptor_optuna.jobs.results import Exported
from rankadaptor_optuna.jobs.stored import load_pruned_job, stored_study
from rankadaptor_optuna.objective import RecoveryObjective
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.studies.recommendation import recommend


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

    In ``out``: ``adapter/`` (PEFT), ``rank_pattern.json`` (arguments of ``peft.LoraConfig``) and, if asked for,
    ``merged/``, the model with the adapter merged in.

    Args:
        storage: Optuna storage URL.
        study_name: A study with a recipe (``search``). Default: the only such study.
        out: Folder to create.
        pruned: Folder of the pruned model. Default: pruned again as the recipe says.
        steps: Training steps. Default: the recipe's.
        seed: Seed of data order and initialisation. Default: the recipe's.
        merge: Whether to write the merged model.
        trust_study: See ``stored_study``.
        say: Receives one line for each step.

    Raises:
        ValueError: There is no such study, no finished trial or recipe in it, ``out`` is not empty, or the training
            failed.
    """
    from peft import PeftModel

    from rankadaptor_optuna.pruning.checkpoint import check_save_path, save_pruned

    check_save_path(out)
    study, recipe = stored_study(storage, study_name, trust_study)
    if steps is not None:
        recipe = replace(recipe, training=replace(recipe.training, steps=steps, epochs=None))
    found = recommend(study)
    job = load_pruned_job(recipe, pruned, found.ranks, study.study_name)
    say(f"Training {job.training.steps} steps with the recommended ranks: {found.evidence.statement}")
    loss, before = train_adapter(job, found.ranks, out / "adapter", base=pruned, seed=seed)
    write_json(out / "rank_pattern.json", job.space.with_fixed(found.ranks).lora_arguments(job.lora))
    if merge:
        adapted = PeftModel.from_pretrained(job.model, out / "adapter")
        save_pruned(adapted.merge_and_unload(), out / "merged", job.tokenizer)
    say(f"Held-out loss {loss:.4f} nats/token, {before:.4f} without recovery.")
    return Exported(found, recipe, study.study_name, masked(storage), loss, before, out)


def train_adapter(
    job: RecoveryObjective, ranks: Ranks, folder: Path, *, base: Path | None = None, seed: int | None = None
) -> tuple[float, float]:
    """Recovers with these ranks and writes the adapter and the tokenizer, completely or not at all.

    Args:
        job: The trial objective.
        ranks: Ranks of the searched modules.
        folder: Folder of the adapter; replaced.
        base: Folder of the pruned model, for the adapter's configuration. Default: as the model was loaded.
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
                if base is not None:
                    adapted.peft_config["default"].base_model_name_or_path = str(base)
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
