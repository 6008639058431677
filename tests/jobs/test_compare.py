from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rankadaptor_optuna.jobs import compare as module
from rankadaptor_optuna.jobs.compare import compare, fisher_ranks
from rankadaptor_optuna.jobs.recipe import Evaluation, Recipe
from rankadaptor_optuna.jobs.results import (
    COMPARED_METHODS,
    DENSE,
    NONE,
    OURS,
    UNIFORM,
    Comparison,
    PairedDifference,
    Row,
)
from rankadaptor_optuna.jobs.search import search
from rankadaptor_optuna.jobs.stored import load_pruned_job
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.data import examples_of
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.references import fisher_information
from rankadaptor_optuna.recovery.tasks import TaskSuite


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare") / "c"


@pytest.fixture(scope="module")
def compared(searched, folder):
    """All methods and the dense model on two fresh seeds; it found its study by itself."""
    options = {
        "pruned": searched.out / "pruned",
        "methods": (DENSE, *COMPARED_METHODS),
        "seeds": 2,
        "trust_study": True,
        "say": lambda line: None,
    }
    return compare(searched.storage, None, folder, **options)


@pytest.fixture
def again(searched):
    """Compares as ``compared`` did, in another folder."""

    def again(out, study_name=None, **options):
        options = {"methods": (DENSE, *COMPARED_METHODS), "seeds": 2, "say": lambda line: None, **options}
        options |= {"trust_study": True}
        return compare(searched.storage, study_name, out, pruned=searched.out / "pruned", **options)

    return again


@pytest.fixture
def job(searched):
    return load_pruned_job(searched.recipe, searched.out / "pruned", searched.recommendation.ranks, searched.study)


def test_every_method_recovers_within_the_budget_on_fresh_seeds_and_unseen_text(compared, searched, job):
    assert [row.method for row in compared.rows] == [DENSE, *COMPARED_METHODS]
    assert compared.references == ["LoRA, uniform", "AdaLoRA", "EVA", "Fisher-proportional"]
    assert compared.seeds == (1000, 1001)
    none, dense = compared.row(NONE), compared.row(DENSE)
    for row in compared.rows[2:]:
        assert len(set(row.losses)) == 2
        assert max(row.losses) < none.losses[0]
        assert row.parameters <= compared.budget, row.method
        if row.method in ("LoRA, uniform", "AdaLoRA", "EVA"):
            assert compared.cost_difference(row.method) == pytest.approx(
                (compared.row(OURS).parameters - compared.budget) / compared.budget, abs=0.01
            )
    assert none.parameters == dense.parameters == 0
    assert (len(none.losses), len(dense.losses)) == (1, 1)
    assert dense.total_parameters > none.total_parameters == sum(p.numel() for p in job.model.parameters())
    ranks = searched.recommendation.ranks
    assert compared.row(OURS).parameters == job.space.cost(ranks) <= compared.budget == job.space.budget
    assert compared.row(OURS).total_parameters == none.total_parameters + compared.row(OURS).parameters
    report = examples_of(job.tokenizer, searched.recipe.read_data().report, length=32, mask_prompt=True)
    with job.recovered(ranks, seed=1001) as adapted:
        assert compared.row(OURS).losses[1] == pytest.approx(block_losses(adapted, report).mean(), abs=1e-6)


def test_it_goes_on_where_it_stopped_and_measures_only_new_ranks_anew(compared, folder, again, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "c")
    stored = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert stored["rows"][-1]["losses"] == compared.rows[-1].losses
    real, measured = module._recover_and_measure, []
    monkeypatch.setattr(module, "_recover_and_measure", lambda *args: measured.append(args) or real(*args))
    assert again(tmp_path / "c").rows == compared.rows
    assert measured == []
    found = module.recommend
    other = Ranks.uniform(compared.ranks, 2)
    monkeypatch.setattr(module, "recommend", lambda study: replace(found(study), ranks=other))
    changed = again(tmp_path / "c")
    assert {(args[0], args[2] == other) for args in measured} == {(OURS, True)}
    assert changed.rows[1:-1] == again(tmp_path / "c").rows[1:-1]
    assert changed.row(OURS).losses != compared.row(OURS).losses
    monkeypatch.setattr(module, "recommend", lambda study: replace(found(study), ranks=compared.uniform))
    same = again(tmp_path / "c")
    assert same.row(OURS).losses == same.row(UNIFORM).losses == compared.row(UNIFORM).losses
    assert len(measured) == 2, "the recommendation is uniform, which has been measured"


def test_measurements_on_another_report_text_are_refused(again, tmp_path, recipe, monkeypatch):
    again(tmp_path / "c", methods=[NONE])
    parts = recipe.read_data()
    monkeypatch.setattr(Recipe, "read_data", lambda self: replace(parts, report=parts.report[1:]))
    with pytest.raises(
        ValueError, match=r"--out .*c belongs to other settings: digest of the report data was \w+, now"
    ):
        again(tmp_path / "c", methods=[NONE, UNIFORM])
    assert again(tmp_path / "c", methods=[NONE]).row(NONE).losses, "all was measured"


def test_a_model_pruned_for_a_comparison_is_pruned_once(searched, tmp_path, monkeypatch):
    options = {"seeds": 2, "trust_study": True, "say": lambda line: None}
    first = compare(searched.storage, None, tmp_path / "c", methods=[NONE], **options)
    monkeypatch.setattr(Recipe, "prune", lambda *args: pytest.fail("pruned again"))
    again = compare(searched.storage, None, tmp_path / "c", methods=[NONE, UNIFORM], **options)
    assert again.row(NONE) == first.row(NONE)
    assert again.row(UNIFORM).parameters == searched.space.budget


def test_tasks_given_are_scored_on_items_to_report_on(again, tmp_path, local_task, monkeypatch):
    parts = []
    real = TaskSuite.__init__
    monkeypatch.setattr(
        TaskSuite,
        "__init__",
        lambda self, *a, **kw: parts.append((kw["part"], kw["limit"])) or real(self, *a, **kw),
    )
    options = {"tasks": ["facts"], "include_path": str(local_task), "limit": 4}
    row = again(tmp_path / "c", methods=[UNIFORM], **options).row(UNIFORM)
    assert parts == [("report", 4)]
    assert [len(accuracies) for accuracies in row.accuracies.values()] == [2]
    with pytest.raises(ValueError, match=r"--out .*c belongs to other settings: limit was 4, now 3\. Use those"):
        again(tmp_path / "c", methods=[UNIFORM], **{**options, "limit": 3})


def test_the_recipes_tasks_and_its_metric_are_compared_by_default(recipe, tmp_path, local_task):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    evaluation = Evaluation(("facts",), "margin", limit=4, report_limit=6, include_path=str(local_task))
    recipe = replace(recipe, evaluation=evaluation)
    search(recipe, tmp_path / "out", trials=1, storage=url, say=lambda line: None)
    options = {"pruned": tmp_path / "out" / "pruned", "methods": (UNIFORM, OURS), "seeds": 2, "say": lambda line: None}
    found = compare(url, "search", tmp_path / "c", trust_study=True, **options)
    assert set(found.row(OURS).accuracies) == {"facts"}
    assert len(found.row(OURS).scores["margin"]) == 2
    assert found.paired(UNIFORM, "margin").verdict == "tie"


def test_what_cannot_be_compared_is_refused_before_any_work(searched, recipe, again, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "open_model", lambda *args: pytest.fail("loaded a model"))
    short = replace(recipe, training=replace(recipe.training, steps=3))
    monkeypatch.setattr(module, "stored_study", lambda *args: (searched.study, short))
    for options, says in (
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"methods": ["LoRA"]}, "no method named 'LoRA'; there are dense, no recovery, LoRA, uniform"),
        ({}, "AdaLoRA needs at least 4 training steps, got 3"),
    ):
        with pytest.raises(ValueError, match=says):
            again(tmp_path / "x", **options)
    monkeypatch.undo()
    few = replace(recipe, training=replace(recipe.training, epochs=0.01))
    monkeypatch.setattr(module, "stored_study", lambda *args: (searched.study, few))
    monkeypatch.setattr(module, "_recover_and_measure", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(Recipe, "prune", lambda *args: pytest.fail("pruned"))
    with pytest.raises(ValueError, match=r"AdaLoRA needs at least 4 training steps, got \d"):
        compare(searched.storage, None, tmp_path / "x", seeds=2, say=lambda line: None)
    assert not (tmp_path / "x").exists()


def test_fisher_ranks_grow_with_a_layers_information_within_the_budget(job):
    ranks = fisher_ranks(job)
    left = job.space.searched_budget - job.space.cost(ranks) + job.space.fixed_cost
    assert 0 <= left < max(job.space.costs)
    information = fisher_information(job.model, job.train)
    order = sorted(ranks, key=lambda layer: information[layer])
    assert [ranks[layer] for layer in order] == sorted(ranks.values())


LOSSES = {
    NONE: [4.0],
    UNIFORM: [2.3, 2.41, 2.5],
    "AdaLoRA": [1.5, 1.6, 1.71],
    "EVA": [2.1, 2.2, 2.3],
    "Fisher-proportional": [2.0, 2.2, 2.1],
    OURS: [2.0, 2.1, 2.2],
}


def made_up(tmp_path, budget):
    scores = {method: {"margin": [-x for x in losses]} for method, losses in LOSSES.items()}
    rows = [Row(method, losses, {}, scores[method], 10, 1.0) for method, losses in LOSSES.items()]
    return Comparison(rows, {}, budget, (0, 1, 2), Ranks({0: 2}), Ranks({0: 4}), tmp_path)


def test_paired_differences_tell_wins_from_losses_and_ties(tmp_path):
    found = made_up(tmp_path, 10)
    for measure in ("loss", "margin"):
        verdicts = {method: found.paired(method, measure).verdict for method in found.references}
        assert verdicts == {UNIFORM: "better", "AdaLoRA": "worse", "EVA": "tie", "Fisher-proportional": "tie"}
    paired = found.paired(UNIFORM)
    test = stats.ttest_rel(LOSSES[OURS], LOSSES[UNIFORM])
    assert paired.mean == pytest.approx(np.mean(LOSSES[OURS]) - np.mean(LOSSES[UNIFORM]))
    assert paired.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert not paired.alike
    assert found.paired("EVA").alike, "the same on every seed leaves no spread to judge by"
    assert PairedDifference.of("loss", np.zeros(3)).verdict == "tie"


def test_parameters_that_differ_by_over_one_percent_are_said(tmp_path):
    found = made_up(tmp_path, 10)
    for parameters, difference in ((10, 0), (9.95, 0), (5, 1.0), (12, -1 / 6)):
        rows = [replace(row, parameters=10 if row.method == OURS else parameters) for row in found.rows]
        assert replace(found, rows=rows).cost_difference("EVA") == pytest.approx(difference)


def test_quantised_weights_are_refused_before_any_recovery(again, tmp_path, monkeypatch):
    def refuse(model, targets):
        raise ValueError("q_proj is quantised")

    monkeypatch.setattr(module, "differentiable_weights", refuse)
    monkeypatch.setattr(module, "_recover_and_measure", lambda *_: pytest.fail("it recovered"))
    with pytest.raises(ValueError, match="q_proj is quantised"):
        again(tmp_path / "out")


def test_methods_are_at_least_one_and_each_once(again, tmp_path):
    with pytest.raises(ValueError, match="name at least one method"):
        again(tmp_path / "none", methods=[])
    rows = again(tmp_path / "twice", methods=[NONE, NONE]).rows
    assert [row.method for row in rows] == [NONE]
