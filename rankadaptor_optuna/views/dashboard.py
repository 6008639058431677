"""publish_dashboard: figures of a study and a note with the recommendation, in optuna-dashboard."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from optuna.study import Study

from rankadaptor_optuna.checks.extras import require
from rankadaptor_optuna.checks.plain_text import markdown
from rankadaptor_optuna.priors.choice import PriorLike
from rankadaptor_optuna.studies.reading import StudyReading
from rankadaptor_optuna.studies.recommendation import Recommendation, recommend_from
from rankadaptor_optuna.views.figures import heat_map_figure, progress_figure, ranks_figure
from rankadaptor_optuna.views.study_view import StudyView
from rankadaptor_optuna.views.style import as_count, as_percent, as_score
from rankadaptor_optuna.views.tables import from_columns, markdown_table

HEAT_MAP_ID = "rankadaptor-1-ranks-over-trials"
PROGRESS_ID = "rankadaptor-2-best-so-far"
RANKS_ID = "rankadaptor-3-recommended-ranks"
_BEGIN = "[//]: # (rankadaptor: written anew by each publish_dashboard; your own text goes above or below)"
_END = "[//]: # (rankadaptor: end)"
_TITLE = "## Recommended ranks"
_LINE = 60  # characters of a long text on one line of code


def publish_dashboard(
    study: Study, *, ranks: str | Sequence[str] | None = None, prior: PriorLike = "pretrained"
) -> None:
    """Publishes figures and a note with the recommendation to the study, where optuna-dashboard shows them.

    Each call replaces the figures, and the part of the note between two (invisible) markers; other text stays.
    Publish a study from one process at a time: two at once may leave a figure unreadable until the next call.

    Args:
        study: A study in any storage; any sampler may have made its trials. Without finished trials the note
            says so and there are no figures; with several objectives there is no recommendation.
        ranks: See ``recommend``.
        prior: See ``recommend``.

    Raises:
        ImportError: The extra ``dashboard`` is not installed.
        ValueError: The study's finished trials have no rank parameters.
    """
    require_dashboard()
    publish_reading(StudyReading(study, ranks=ranks), prior=prior)


def publish_reading(reading: StudyReading, *, prior: PriorLike = "pretrained") -> None:
    """Publishes a study that was read already; see ``publish_dashboard``."""
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    study, view = reading.study, StudyView.of(reading)
    if view.numbers and not view.names:
        reading.check_ranks()
    found = recommend_from(reading, prior=prior) if view.numbers and view.scores is not None else None
    figures = {}
    if view.numbers:
        figures[HEAT_MAP_ID] = heat_map_figure(view)
    if found is not None:
        figures |= {PROGRESS_ID: progress_figure(view), RANKS_ID: ranks_figure(view, found)}
    for name, figure in figures.items():
        save_plotly_graph_object(study, figure, graph_object_id=name)
    old = get_note(study)
    new = _replaced(old, study_note(view, found))
    if new != old:
        save_note(study, new)


def require_dashboard() -> None:
    """Checks that optuna-dashboard and plotly are installed.

    Raises:
        ImportError: One is missing; the message says how to install it.
    """
    require("optuna_dashboard", "plotly")


def study_note(view: StudyView, found: Recommendation | None) -> str:
    """Returns the recommendation in GitHub's Markdown.

    Args:
        view: The study.
        found: Its recommendation; None with several objectives or without finished trials.
    """
    if view.scores is None:
        return f"{_TITLE}\n\nA recommendation needs one objective; this study has several."
    if found is None:
        return f"{_TITLE}\n\nNo recommendation yet: the study has no finished trial."
    lines = [_TITLE, "", f"**{found.evidence.statement}**", ""]
    predicted = f"{as_score(found.predicted)} ± {found.std:.2g} (one standard deviation)"
    lines += [f"* Predicted {markdown(view.objective)}: {predicted}."]
    if view.uniform_score is not None:
        n = int(view.is_uniform.sum())
        mean = f" (mean of {n} trials)" if n > 1 else ""
        lines += [f"* Uniform configuration: {as_score(view.uniform_score)}{mean}."]
    if view.best is not None and np.isfinite(view.best[-1]):
        number = view.numbers[np.flatnonzero(view.within_budget & (view.scores == view.best[-1]))[0]]
        lines += [f"* Best single trial, noise included: {as_score(view.best[-1])} (trial {number})."]
    lines += [f"* {_cost_text(view, found)}.", f"* Closest finished trials: {closest_trials(found)}.", ""]
    lines += [markdown(view.converged), ""] if view.converged else []
    lines += [_ranks_table(view, found), ""]
    if any(found.all_ranks.values()):
        lines += ["Arguments of PEFT; give `target_modules` as in your training:", "", *_lora_code(found)]
    return "\n".join(lines)


def closest_trials(found: Recommendation) -> str:
    """Returns the finished trials nearest to a recommendation in one line."""
    return "; ".join(
        f"trial {number} (ranks that differ: {differing}, score {as_score(score)})"
        for number, differing, score in found.evidence.closest
    )


def _cost_text(view: StudyView, found: Recommendation) -> str:
    space = view.space
    of_ranks = space is None or set(space.costs) == {1.0}
    text = f"{'Sum of ranks' if of_ranks else 'Trainable parameters'}: {as_count(found.cost)}"
    if space is None:
        return f"{text}, no budget"
    if space.budget is None:
        return f"{text}, no budget (uniform: {as_count(space.cost(space.uniform()))})"
    return f"{text} of {as_count(space.budget)} in the budget ({as_percent(found.cost / space.budget)})"


def _ranks_table(view: StudyView, found: Recommendation) -> str:
    kind = "layer" if "" in view.series else "sublayer"
    columns = {kind: list(view.labels), "rank": [found.params[name] for name in view.names]}
    if view.uniform_ranks is not None:
        columns["uniform"] = list(view.uniform_ranks)
    if view.profile is not None:
        columns["weights pruned"] = [as_percent(share) for share in view.profile]
    if view.sensitivity is not None:
        columns["share of the sensitivity"] = [as_percent(share) for share in view.sensitivity]
    table = markdown_table(from_columns(columns))
    fixed = [f"{module} (rank {rank})" for module, rank in found.all_ranks.items() if module not in found.ranks]
    return f"{table}\n\nNot searched: {kind}s {', '.join(fixed)}." if fixed else table


def _lora_code(found: Recommendation) -> list[str]:
    """Returns the call of ``LoraConfig`` in lines of at most 88 characters: the page does not wrap code."""
    lines = []
    for name, value in found.all_ranks.lora_arguments(found.lora).items():
        if isinstance(value, str) and len(value) > _LINE:
            pieces = [value[start : start + _LINE] for start in range(0, len(value), _LINE)]
            lines += [f"    {name}=(", *(f"        {piece!r}" for piece in pieces), "    ),"]
        else:
            lines += textwrap.wrap(f"    {name}={value!r},", _LINE + 28, subsequent_indent=" " * 8)
    return ["```python", "from peft import LoraConfig", "", "config = LoraConfig(", *lines, ")", "```"]


def _replaced(old: str, part: str) -> str:
    """Returns a note with the part between our markers replaced, or appended; other text stays."""
    block = f"{_BEGIN}\n\n{part}\n\n{_END}"
    before, begin, rest = old.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + block + after
    return f"{old.rstrip()}\n\n{block}\n" if old.strip() else f"{block}\n"
