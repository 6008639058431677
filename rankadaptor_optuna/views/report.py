"""The report of a quickstart: Markdown and pictures."""

from __future__ import annotations

import math

from rankadaptor_optuna.jobs.output import write_text
from rankadaptor_optuna.jobs.results import UNIFORM, QuickstartResult
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.views.card import usage
from rankadaptor_optuna.views.comparison import comparison_table, difference_text, worse_than_none
from rankadaptor_optuna.views.dashboard import closest_trials, publish_reading
from rankadaptor_optuna.views.pictures import draw_progress, draw_ranks
from rankadaptor_optuna.views.study_view import StudyView
from rankadaptor_optuna.views.style import as_count, as_json
from rankadaptor_optuna.views.tables import markdown_table


def report_verdict(result: QuickstartResult) -> str:
    """Returns whether the recommendation beat uniform, in one sentence."""
    comparison = result.comparison
    worse = " ".join(worse_than_none(comparison).split())
    if comparison.ranks == comparison.uniform:
        rank = next(iter(comparison.uniform.values()))
        fixed = {layer: r for layer, r in result.search.space.fixed_ranks.items() if r != rank}
        others = ", ".join(f"{layer} (rank {r})" for layer, r in fixed.items())
        where = f" of the searched layers, all but {others}," if fixed else ""
        sentence = f"The search recommends the uniform configuration{where} itself"
        return f"{sentence}: it expects no other to be safely better. {worse}".rstrip()
    paired = comparison.paired(UNIFORM)
    sentence = {
        "better": "The recommendation beat uniform",
        "worse": "The recommendation did NOT beat uniform, it was worse",
        "tie": "No difference from uniform was shown",
    }[paired.verdict]
    where = f"on {len(comparison.seeds)} fresh seeds and text that the search did not use"
    return f"{sentence} {where}: perplexity {difference_text(paired)}. {worse}".rstrip()


def report_text(result: QuickstartResult) -> str:
    """Returns the report in Markdown; it shows ``ranks.png`` and ``progress.png``."""
    search, comparison = result.search, result.comparison
    space, found = search.space, search.recommendation
    ranks = list(found.ranks.values())
    table = [["layer", *map(str, space.layers)]]
    table += [[name or "rank", *map(str, ranks[part])] for name, part in space.series.items()]
    kept = ", ".join(f"{layer} (rank {rank})" for layer, rank in space.fixed_ranks.items())
    return f"""# LoRA ranks for each layer

{report_verdict(result)}

{markdown_table(comparison_table(comparison))}

Means ± half widths of 95% t intervals over {len(comparison.seeds)} fresh seeds of data order and initialisation, on
text that neither training nor search has seen. Continuation: accuracy of a choice among four continuations of a
passage, by lm-eval.

## Recommended ranks

{markdown_table(table)}

Trainable parameters: {as_count(found.cost)} of {as_count(space.budget or math.inf)} in the budget.\
{f" Layers {kept} are not pruned and not searched." if kept else ""}

![Rank of each layer, its sensitivity and the share of its weights that pruning took](ranks.png)

Evidence: {found.evidence.statement} Closest finished trials: {closest_trials(found)}.

![Best score so far against uniform](progress.png)

## Use the adapter

{usage(result.exported)}

## Recipe

```json
{as_json(search.recipe.to_dict())}
```
"""


def write_report(result: QuickstartResult) -> None:
    """Writes ``report.md``, ``ranks.png`` and ``progress.png``, and publishes the study for optuna-dashboard."""
    search = result.search
    reading = StudyReading(search.study)
    view = StudyView.of(reading)
    draw_ranks(search.space, search.recommendation, view).savefig(search.out / "ranks.png", dpi=120)
    draw_progress(view).savefig(search.out / "progress.png", dpi=120)
    publish_reading(reading)
    write_text(search.out / "report.md", report_text(result))
