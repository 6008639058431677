"""Hugging Face's Trainer.hyperparameter_search with RankAdaptorSampler, on the embedded model: about two minutes."""

from __future__ import annotations

import copy

import optuna
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.llm.texts import load_texts
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.ranks import LoraSettings
from rankadaptor_optuna.recovery.lora import lora_config
from rankadaptor_optuna.recovery.models import load_model

STORAGE, NAME = "sqlite:///trainer.db", "trainer"

dense, tokenizer = load_model()
texts = load_texts()
pruned = prune(dense, tokenizer, ratio=0.25, calibration=texts.train).model
space = RankSpace.from_model(pruned, candidates=(2, 4, 6, 8, 10, 12), budget="uniform:8")


def examples(passages: list[str], n: int) -> list[dict[str, list[int]]]:
    rows = [tokenizer(passage)["input_ids"][:128] for passage in passages]
    return [{"input_ids": ids, "labels": ids} for ids in rows if len(ids) == 128][:n]


def model_init(trial: optuna.Trial | None):
    set_seed(0)  # the same for every trial, so that they differ by their ranks
    ranks = space.uniform() if trial is None else space.suggest(trial)
    return get_peft_model(copy.deepcopy(pruned), lora_config(space.with_fixed(ranks), LoraSettings(space.targets)))


def hp_space(trial: optuna.Trial) -> dict[str, float]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True)}  # searched beside the ranks


trainer = Trainer(
    model_init=model_init,
    args=TrainingArguments(
        "trainer-out", max_steps=4, per_device_train_batch_size=2, save_strategy="no", report_to="none"
    ),
    train_dataset=examples(texts.train, 8),
    eval_dataset=examples(texts.validation, 4),
)
trainer.hyperparameter_search(
    hp_space=hp_space,
    backend="optuna",
    direction="minimize",
    n_trials=4,
    sampler=RankAdaptorSampler(space, seed=0),
    storage=STORAGE,
    study_name=NAME,
    load_if_exists=True,
)
best = recommend(optuna.load_study(study_name=NAME, storage=STORAGE))
print(best.evidence.statement)
print("LoraConfig arguments:", best.lora_arguments)
print("learning rate =", best.params["learning_rate"])
