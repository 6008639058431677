"""The model card of an exported adapter."""

from __future__ import annotations

import math

from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.jobs.results import Exported
from rankadaptor_optuna.plain_text import code_span, markdown, yaml_scalar
from rankadaptor_optuna.recovery.embedded import HUB_MODEL
from rankadaptor_optuna.views.style import as_count, as_json
from rankadaptor_optuna.views.tables import from_columns, markdown_table


def model_card(exported: Exported) -> str:
    """Returns the model card of an adapter, as the Hugging Face Hub shows it."""
    found, recipe = exported.recommendation, exported.recipe
    base = HUB_MODEL if recipe.model == "embedded" else recipe.model
    after, before = (f"{loss:.4f} (perplexity {math.exp(loss):.2f})" for loss in (exported.loss, exported.loss_before))
    ranks = from_columns({"layer": list(found.ranks), "rank": list(found.ranks.values())})
    return f"""---
library_name: peft
base_model: {yaml_scalar(base)}
tags: [lora, pruning, rankadaptor]
---

# LoRA recovery of {markdown(base)}, with a rank per layer

{found.evidence.statement} Source: {found.evidence.n_trials} trials of study {code_span(exported.study_name)} in
{code_span(exported.storage_masked)}.

Validation loss per token: {after}; without recovery {before}. The search scored its trials on this text.

Trainable parameters: {as_count(found.cost)} (budget {markdown(recipe.space.budget)}). `rank_pattern.json` holds the
arguments of `peft.LoraConfig`.

{markdown_table(ranks)}

## Recipe

```json
{as_json(recipe.to_dict())}
```
"""


def write_card(exported: Exported) -> None:
    """Writes the model card, ``README.md``, into the export's folder."""
    write_text(exported.out / "README.md", model_card(exported))
