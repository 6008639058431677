"""The quickstart in Python: prune a real model, search a LoRA rank per layer, recommend."""

from __future__ import annotations

import optuna

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, RecoveryObjective, recommend
from rankadaptor_optuna.llm.texts import load_texts
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.recovery.models import load_model

model, tokenizer = load_model()  # or load_model("any/llama-like-model")
texts = load_texts()
pruned = prune(model, tokenizer, ratio=0.25, calibration=texts.train)
model = pruned.model.to(model.device)  # put together in main memory
space = RankSpace.from_model(model, candidates=(2, 4, 6, 8, 10, 12), budget="uniform:8")
objective = RecoveryObjective(model, tokenizer, space, train=texts.train, validation=texts.validation)
study = optuna.create_study(
    storage="sqlite:///quickstart.db",
    study_name="quickstart",
    sampler=RankAdaptorSampler(space, seed=0),
    direction="minimize",
    load_if_exists=True,
)
study.optimize(objective, n_trials=8)
best = recommend(study)
print(best.evidence.statement)
print("LoraConfig arguments:", best.lora_arguments)
