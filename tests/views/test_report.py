from __future__ import annotations

from dataclasses import replace

import pytest
from optuna_dashboard import get_note

from rankadaptor_optuna import recommend
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import (
    DENSE,
    NONE,
    OURS,
    UNIFORM,
    Comparison,
    Exported,
    QuickstartResult,
    Row,
    SearchResult,
)
from rankadaptor_optuna.views.report import report_text, report_verdict, write_report

LOSSES = {DENSE: [2.0], NONE: [3.0], UNIFORM: [2.5, 2.6, 2.55], OURS: [2.4, 2.5, 2.44]}


@pytest.fixture(params=["layer", "sublayer"])
def result(request, make_study, space, by_sublayer, tmp_path):
    """The result of a quickstart with made-up measurements."""
    space = space if request.param == "layer" else by_sublayer
    study, recipe = make_study(6, space), Recipe.from_dict({"preset": "quickstart", "seed": 3})
    found = recommend(study)
    rows = [Row(method, losses, {"continuation": [0.5]}, {}, 200, 1.0, 1000) for method, losses in LOSSES.items()]
    comparison = Comparison(rows, {}, space.budget, (1, 2, 3), found.ranks, space.uniform(), tmp_path / "compare")
    search = SearchResult(study, "quickstart", "sqlite://", recipe, space, found, None, tmp_path)
    exported = Exported(found, recipe, "quickstart", "sqlite://", 2.4, 3.0, str(tmp_path / "pruned"), tmp_path)
    return QuickstartResult(search, comparison, exported, 60.0)


def with_losses(result, losses):
    rows = [replace(row, losses=losses if row.method == OURS else row.losses) for row in result.comparison.rows]
    return replace(result, comparison=replace(result.comparison, rows=rows))


def test_the_report_has_measurements_ranks_and_settings(result, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(result)
    text, space = (tmp_path / "report.md").read_text(), result.search.space
    ranks = list(result.search.recommendation.ranks.values())
    rows = ["| layer | 1 | 2 | 3 | 4 | 5 | 6 |", "| --- |" + " ---: |" * 6]
    rows += [f"| {' | '.join([name or 'rank', *map(str, ranks[part])])} |" for name, part in space.series.items()]
    assert "\n".join(rows) in text
    assert report_verdict(result) in text
    assert "| dense | 7.39 |" in text
    assert "Layers 0 (rank 8), 7 (rank 8) are not pruned and not searched." in text
    assert '"seed": 3' in text
    assert f'from_pretrained(model, "{tmp_path.as_posix()}/adapter")' in text
    for picture in ("ranks.png", "progress.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).stat().st_size > 1000
    assert "Recommended ranks" in get_note(result.search.study)


def test_without_any_adapter_the_report_says_so(result):
    found = result.exported.recommendation
    none = replace(found, all_ranks=type(found.all_ranks).uniform(found.all_ranks, 0))
    text = report_text(replace(result, exported=replace(result.exported, recommendation=none)))
    assert "## Use the adapter\n\nThere is no adapter: every layer has rank 0.\n" in text


@pytest.mark.parametrize("result", ["layer"], indirect=True)
@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([2.4, 2.5, 2.44], "The recommendation beat uniform on 3 fresh seeds"),
        ([2.6, 2.7, 2.66], "The recommendation did NOT beat uniform, it was worse on 3 fresh seeds"),
        ([2.4, 2.7, 2.55], "No difference from uniform was shown on 3 fresh seeds"),
    ],
)
def test_the_verdict_follows_the_interval(result, losses, verdict):
    assert report_verdict(with_losses(result, losses)).startswith(verdict)


def test_a_recommendation_of_uniform_itself_is_no_win(result):
    comparison = replace(result.comparison, ranks=result.comparison.uniform)
    others = " of the searched layers, all but 0 (rank 8), 7 (rank 8),"  # the uniform rank is 8, or 4 by sublayers
    where = "" if result.search.space.granularity == "layer" else others
    says = f"The search recommends the uniform configuration{where} itself: it expects no other"
    assert report_verdict(replace(result, comparison=comparison)).startswith(says)


@pytest.mark.parametrize("result", ["layer"], indirect=True)
def test_a_recovery_that_is_worse_than_none_is_said(result):
    worse = report_verdict(with_losses(result, [3.4, 3.5, 3.44]))
    assert worse.startswith("The recommendation did NOT beat uniform")
    assert "Recovery made the model WORSE than no recovery: perplexity 31.4" in worse
    assert "20.09 without. Lower the learning rate, or train longer." in worse
    assert "WORSE than no" not in report_verdict(result)
