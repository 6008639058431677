"""The model card of an exported adapter."""

from __future__ import annotations

import json
import math

from rankadaptor_optuna.checks.plain_text import code_span, markdown, one_line
from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.jobs.results import Exported
from rankadaptor_optuna.recovery.embedded import HUB_MODEL
from rankadaptor_optuna.views.style import as_count, as_json
from rankadaptor_optuna.views.tables import from_columns, markdown_table


def model_card(exported: Exported) -> str:
    """Returns the model card of an adapter, as the Hugging Face Hub shows it."""
    found, recipe = exported.recommendation, exported.recipe
    dense = HUB_MODEL if recipe.model == "embedded" else recipe.model
    after, before = (f"{loss:.4f} (perplexity {math.exp(loss):.2f})" for loss in (exported.loss, exported.loss_before))
    worse = " **The recovery made the model worse.**" if exported.loss > exported.loss_before else ""
    searched = ["yes" if module in found.ranks else "no" for module in found.all_ranks]
    ranks = from_columns({"layer": [*found.all_ranks], "rank": [*found.all_ranks.values()], "searched": searched})
    return f"""---
library_name: peft
base_model: {json.dumps(one_line(exported.base))}
tags: [lora, pruning, rankadaptor]
---

# LoRA recovery of a pruned {markdown(dense)}, with a rank per layer

{usage(exported)}

{found.evidence.statement} Source: {found.evidence.n_trials} trials of study {code_span(exported.study_name)} in
{code_span(exported.storage_masked)}.

Validation loss per token: {after}; without recovery {before}.{worse} The search scored its trials on this text.

Trainable parameters: {as_count(found.cost)} (budget {markdown(recipe.space.budget)}). `rank_pattern.json` holds the
arguments of `peft.LoraConfig`.

{markdown_table(ranks)}

## Recipe

```json
{as_json(recipe.to_dict())}
```
"""


def usage(exported: Exported) -> str:
    """Returns the code that loads an adapter on its base, as Markdown."""
    if not any(exported.recommendation.all_ranks.values()):
        return "There is no adapter: every layer has rank 0."
    return f"""```python
import rankadaptor_optuna  # registers the pruned architecture
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(exported.base)})  # its layers are those of the adapter
model = PeftModel.from_pretrained(model, {json.dumps((exported.out.resolve() / "adapter").as_posix())})
```"""


def write_card(exported: Exported) -> None:
    """Writes the model card, ``README.md``, into the export's folder."""
    write_text(exported.out / "README.md", model_card(exported))
