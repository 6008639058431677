from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import optuna
import pytest
import torch
from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.trial import TrialState
from transformers import AutoModelForCausalLM

import rankadaptor_optuna.jobs.search
import rankadaptor_optuna.recovery.models
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs.compare import compare
from rankadaptor_optuna.jobs.export import export
from rankadaptor_optuna.jobs.inputs import Inputs
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.search import pruner_of, search
from rankadaptor_optuna.jobs.stored import stored_recipe
from rankadaptor_optuna.priors.store import PriorStore
from rankadaptor_optuna.pruning import load_pruned
from rankadaptor_optuna.surrogate.prior import load_prior


@pytest.fixture
def values(values, searched):
    """The recipe of a model that is pruned already, with the shortest recoveries."""
    return {**values, "model": str(searched.out / "pruned"), "training": {"steps": 1}}


def complete(url, name="search"):
    study = optuna.load_study(study_name=name, storage=url)
    return [t for t in study.trials if t.state is TrialState.COMPLETE]


def test_search_prunes_searches_and_writes_the_answer_then_goes_on(tiny, tmp_path):
    out, said, recipe = tmp_path / "out", [], Recipe.from_dict(tiny[0])
    found = search(recipe, out, trials=2, say=said.append)
    answer = json.loads((out / "recommendation.json").read_text())
    assert answer["ranks"] == {str(layer): rank for layer, rank in found.recommendation.ranks.items()}
    assert answer["rank_pattern"] == found.recommendation.rank_pattern
    assert load_pruned(out / "pruned").config.pruning["ratio"] == 0.2
    assert found.pruned.parameters_removed == pytest.approx(0.2, abs=0.02)
    assert (found.study_name, found.storage) == ("search", f"sqlite:///{out / 'study.db'}")
    assert len(complete(found.storage)) == 2
    assert set(complete(found.storage)[0].params.values()) == {4}
    again = search(recipe, out, trials=3, say=said.append)
    assert len(complete(found.storage)) == 3
    assert again.pruned is None
    assert said[-1] == again.recommendation.evidence.statement
    assert json.loads((out / "recommendation.json").read_text())["evidence"] == said[-1]


@pytest.mark.parametrize(
    ("reports", "pruner"),
    [
        ({}, NopPruner),
        ({"report_every": 1}, MedianPruner),
        ({"report_every": 1, "pruner": "hyperband"}, HyperbandPruner),
        ({"report_items": True, "pruner": "wilcoxon"}, WilcoxonPruner),
    ],
)
def test_the_pruner_goes_with_what_trials_report(reports, pruner):
    assert type(pruner_of(Recipe.from_dict(reports), 8)) is pruner


def test_pruned_trials_count_among_those_to_reach(values, tmp_path, monkeypatch):
    def two_finish(recipe, steps):
        return WilcoxonPruner(p_threshold=1.0, n_startup_steps=0)  # stops what is worse after the first batch

    monkeypatch.setattr(rankadaptor_optuna.jobs.search, "pruner_of", two_finish)
    search(Recipe.from_dict(values | {"report_items": True}), tmp_path / "out", trials=4, say=lambda line: None)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}")
    states = [t.state for t in study.trials]
    assert len(states) == 4
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}


def test_another_worker_needs_the_storage_alone(recipe, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    search(recipe, tmp_path / "one", trials=1, storage=url, study_name="s", say=lambda line: None)
    assert stored_recipe(url, "s", trust_study=True) == replace(recipe, dtype="float32")
    assert main(["search", "--storage", url, "--out", str(tmp_path / "two"), "--trials", "2", "--trust-study"]) == 0
    assert len(complete(url, "s")) == 2
    assert (tmp_path / "two" / "recommendation.json").exists()
    monkeypatch.setattr(rankadaptor_optuna.jobs.search, "run_trials", lambda study, job, n, **_: reached.append(n))
    reached = []
    for trials in ([], ["--trials", "5"], []):
        assert main(["search", "--storage", url, "--out", str(tmp_path / "two"), "--trust-study", *trials]) == 0
    assert reached == [2, 5, 5], "the number that a worker set last"


def test_a_search_for_accuracy_is_for_the_highest(values, local_task, tmp_path):
    evaluation = {"tasks": ["facts"], "metric": "accuracy", "include_path": str(local_task), "limit": 6}
    search(Recipe.from_dict(values | {"evaluation": evaluation}), tmp_path / "out", trials=2, say=lambda line: None)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}")
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.metric_names == ["accuracy"]
    assert [t.value for t in study.trials] == [t.user_attrs["facts:accuracy"] for t in study.trials]
    assert all(0 <= t.value <= 1 and t.value * 6 == pytest.approx(round(t.value * 6)) for t in study.trials)


def test_an_unknown_task_is_refused_before_anything_is_written(values, local_task, tmp_path, monkeypatch):
    real = lm_eval.tasks.TaskManager  # its index of lm-eval's own tasks takes seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: real(None, include_path, False))
    evaluation = {"tasks": ["fact"], "include_path": str(local_task)}
    with pytest.raises(ValueError, match="lm-eval knows no task named fact"):
        search(Recipe.from_dict(values | {"evaluation": evaluation}), tmp_path / "out", trials=1)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_pruned_already_is_searched_as_it_is(values, tmp_path):
    found = search(
        Recipe.from_dict(values | {"pruning": {"ratio": 0.5}}), tmp_path / "out", trials=1, say=lambda line: None
    )
    assert found.pruned is None
    assert load_pruned(tmp_path / "out" / "pruned").config.pruning["ratio"] == 0.2


def test_whole_blocks_away_every_layer_left_is_searched_compared_and_exported(values, make_model, tokenizer, tmp_path):
    """Shortened leaves an ordinary model of layers of one shape, none of which lost anything."""
    make_model(num_hidden_layers=8).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    values |= {"model": str(tmp_path / "dense"), "training": {"steps": 2}}
    values["pruning"] = {"method": "shortened", "ratio": 0.25, "n_samples": 2, "sample_length": 16}
    url, out = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "out"
    found = search(Recipe.from_dict(values), out, trials=2, storage=url, say=lambda line: None)
    assert list(found.recommendation.ranks) == [*range(6)]
    assert len(load_pruned(out / "pruned").model.layers) == 6
    options = {"pruned": out / "pruned", "trust_study": True, "say": lambda line: None}
    methods = ["LoRA, uniform", "EVA"]
    rows = compare(url, "search", tmp_path / "c", seeds=2, methods=methods, **options).rows
    assert all(0 < row.parameters <= 1.005 * rows[0].parameters for row in rows)
    export(url, "search", tmp_path / "adapter", merge=True, **options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    again = search(Recipe.from_dict(values | {"model": str(out / "pruned")}), tmp_path / "again", trials=1)
    assert list(again.recommendation.ranks) == [*range(6)]


def test_a_model_that_others_pruned_is_left_as_it_is(tiny, model):
    inputs = Inputs(Recipe.from_dict(tiny[0] | {"pruning": {"method": "none"}}))
    found = inputs.objective().model
    assert inputs.pruned is None
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.parameters())


def test_other_settings_in_the_same_folder_or_study_are_refused_by_name(tiny, searched, tmp_path):
    other = Recipe.from_dict(tiny[0] | {"seed": 5})
    for out in (searched.out, tmp_path / "two"):
        with pytest.raises(ValueError, match="belongs to other settings: seed was 0, now 5"):
            search(other, out, trials=1, storage=searched.storage)
    assert not (tmp_path / "two").exists()


def test_a_worker_on_another_kind_of_machine_is_refused_unless_the_recipe_says_the_dtype(recipe, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    options = {"trials": 1, "storage": url, "say": lambda line: None}
    search(replace(recipe, device="cpu"), tmp_path / "one", **options)
    assert stored_recipe(url, trust_study=True) == replace(recipe, device="cpu", dtype="float32")
    search(recipe, tmp_path / "one", **options)
    monkeypatch.setattr(rankadaptor_optuna.recovery.models, "search_dtype", lambda device: torch.bfloat16)
    search(replace(recipe, dtype="float32"), tmp_path / "two", **options)
    for out in ("one", "three"):
        with pytest.raises(ValueError, match="belongs to other settings: dtype was float32, now bfloat16"):
            search(recipe, tmp_path / out, **options)


def test_a_worker_with_another_text_is_refused_before_any_pruning(values, tmp_path, monkeypatch, tiny):
    url, text = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "text.txt"
    text.write_text(Path(tiny[0]["data"]["train"]).read_text())
    values = {**tiny[0], "data": {**tiny[0]["data"], "train": str(text)}, "training": {"steps": 1}}
    options = {"trials": 1, "storage": url, "say": lambda line: None}
    search(Recipe.from_dict(values), tmp_path / "one", **options)
    search(Recipe.from_dict(values), tmp_path / "one", **{**options, "trials": 2})
    monkeypatch.setattr(Recipe, "prune", lambda *args: pytest.fail("pruned"))
    monkeypatch.setattr("rankadaptor_optuna.jobs.inputs.read_texts", lambda source: ["another Python's reference"])
    with pytest.raises(ValueError, match=r"digest of the calibration was \w+, now \w+\. Use"):
        search(Recipe.from_dict(values), tmp_path / "two", **options)
    text.write_text(text.read_text().replace("rank", "tank"))
    for out in ("one", "two"):
        with pytest.raises(ValueError, match="digest of the data was"):
            search(Recipe.from_dict(values), tmp_path / out, **options)


@pytest.mark.parametrize(
    ("section", "setting", "message"),
    [
        ("data", {"train": "/no/where.jsonl"}, "there is no file /no/where.jsonl"),
        ("data", {"block_length": 100_000}, "too few for one block of 100000"),
        ("lora", {"targets": ["q_proj", "v_porj"]}, "has no modules named \\['v_porj'\\] to adapt"),
        ("lora", {"targets": ["q_proj", "lm_head"]}, "has no modules named \\['lm_head'\\] to adapt"),
        ("space", {"budget": 2000}, "space.budget 2,000 is below the cheapest configuration: rank 2 in every layer"),
        ("pruning", {"keep_first": 3, "keep_last": 3}, "nothing to prune"),
    ],
)
def test_data_targets_and_budget_are_checked_before_any_pruning(tiny, tmp_path, monkeypatch, section, setting, message):
    monkeypatch.setattr("rankadaptor_optuna.pruning.core.PLANNERS", None)
    values = {**tiny[0], section: {**tiny[0].get(section, {}), **setting}}
    with pytest.raises(ValueError, match=message):
        search(Recipe.from_dict(values), tmp_path / "out", trials=1, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_tokens_that_the_model_does_not_know_are_refused_before_any_pruning(tiny, make_model, tokenizer, tmp_path):
    make_model(vocab_size=64).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"the tokenizer gave token id \d+, but the model knows 64 tokens"):
        Inputs(Recipe.from_dict({**tiny[0], "model": str(tmp_path / "dense")}))


def test_a_pruned_model_outlives_a_later_refusal(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "check_space", lambda *args: None)
    values = {**tiny[0], "space": {"candidates": [2, 4, 8], "budget": 8500}}
    with pytest.raises(ValueError, match="budget 8,500 is below the cheapest configuration"):
        search(Recipe.from_dict(values), tmp_path / "out", trials=1, say=lambda line: None)
    assert load_pruned(tmp_path / "out" / "pruned").config.pruning["ratio"] == 0.2


def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written(values, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text("[training]\nstepz = 1")
    for arguments, says in (
        ([str(tmp_path / "recipe.toml")], "training.stepz: no such setting"),
        ([], "give a recipe"),
        (["--storage", f"sqlite:///{tmp_path / 'empty.db'}"], "there is no file"),
    ):
        assert main(["search", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        search(Recipe.from_dict(values), tmp_path / "out", trials=0)
    with pytest.raises(ValueError, match="too few for one block of 100000"):
        search(
            Recipe.from_dict(values | {"data": {**values["data"], "block_length": 100_000}}), tmp_path / "out", trials=1
        )
    assert not (tmp_path / "out").exists()


def test_a_search_starts_from_a_prior_of_its_database_or_from_the_shipped_one_if_it_is_bad(recipe, tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    PriorStore(url).add("mine", load_prior("pretrained"))
    with pytest.raises(ValueError, match="there is no prior db:other"):
        search(recipe, tmp_path / "a", trials=1, storage=url, prior="db:other")
    with pytest.raises(ValueError, match="name the database that holds the prior db:mine"):
        search(recipe, tmp_path / "a", trials=1, prior="db:mine")
    assert not (tmp_path / "a").exists()
    search(recipe, tmp_path / "a", trials=1, storage=url, prior="db:mine", say=lambda _: None)
    command = ["search", "--storage", url, "--trials", "1", "--trust-study", "--out", str(tmp_path / "b")]
    assert main([*command, "--prior", "nowhere"]) == 2
    assert "cannot read the prior 'nowhere'" in capsys.readouterr().err
    assert main([*command, "--prior", "none"]) == 0
    stored = optuna.load_study(study_name="search", storage=url).user_attrs["rankadaptor:prior"]
    assert stored == "db:mine@1"
    gone = {"study_name": "other", "prior": "db:gone", "on_bad_prior": "pretrained", "say": lambda _: None}
    search(recipe, tmp_path / "b", trials=1, storage=url, **gone)
    other = [*command, "--study", "other", "--prior", "db:gone"]
    assert main(other) == 2
    assert main([*other, "--on-bad-prior", "pretrained"]) == 0
    assert "rankadaptor:prior" not in optuna.load_study(study_name="other", storage=url).user_attrs


def test_a_mistyped_task_of_the_report_is_refused_before_pruning(values, tmp_path):
    recipe = Recipe.from_dict({**values, "evaluation": {"report_tasks": ["boolqq"]}})
    with pytest.raises(ValueError, match="lm-eval knows no task named boolqq"):
        search(recipe, tmp_path / "out", trials=1, say=lambda line: None)
    assert not (tmp_path / "out" / "pruned").exists()
