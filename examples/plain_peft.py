"""An objective of your own, with plain PEFT and a plain PyTorch loop, on the embedded model: about two minutes."""

from __future__ import annotations

import optuna
import torch
from peft import LoraConfig, get_peft_model

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, note_sensitivity, recommend
from rankadaptor_optuna.llm.texts import load_texts
from rankadaptor_optuna.pruning import prune
from rankadaptor_optuna.recovery.models import load_model

STEPS, LENGTH = 4, 128

model, tokenizer = load_model()
texts = load_texts()
model = prune(model, tokenizer, ratio=0.25, calibration=texts.train).model.to(model.device)
space = RankSpace.from_model(model, candidates=(2, 4, 6, 8, 10, 12), budget="uniform:8")


def blocks(passages: list[str], n: int) -> torch.Tensor:
    ids = tokenizer("\n".join(passages), return_tensors="pt").input_ids[0, : n * LENGTH]
    return ids.view(n, LENGTH).to(model.device)


train, held_out = blocks(texts.train, 2 * STEPS), blocks(texts.validation, 4)


def objective(trial: optuna.Trial) -> float:
    ranks = space.with_fixed(space.suggest(trial))  # within the budget; those of layers left whole are fixed
    config = LoraConfig(**ranks.lora_arguments())  # rank_pattern and the like; layers of rank 0 are left out
    torch.manual_seed(0)  # the same for every trial, so that they differ by their ranks
    adapted = get_peft_model(model, config)
    try:
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
        for batch in train.split(2):
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        note_sensitivity(trial, space, adapted, held_out)  # once, of uniform ranks: where is rank worth most?
        with torch.no_grad():
            return float(adapted(input_ids=held_out, labels=held_out).loss)
    finally:
        adapted.unload()  # the next trial adapts the same model


study = optuna.create_study(direction="minimize", sampler=RankAdaptorSampler(space, seed=0))
study.optimize(objective, n_trials=5)
best = recommend(study)
print(best.evidence.statement)
print("LoraConfig arguments:", best.lora_arguments)
