from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import optuna
import pytest
from scipy import stats

from rankadaptor_optuna.jobs import compare as compare_module
from rankadaptor_optuna.jobs.results import METHODS, Row
from rankadaptor_optuna.recovery.train import TrainingConfig


@pytest.fixture
def paper():
    from benchmarks.paper import table as paper_table

    return paper_table


@pytest.fixture
def ablations():
    from benchmarks.paper import ablations as paper_ablations

    return paper_ablations


LOSSES = {
    "no recovery": [4.0],
    "LoRA, uniform": [2.3, 2.41, 2.5],
    "AdaLoRA": [1.5, 1.6, 1.71],
    "EVA": [2.5, 2.61, 2.7],
    "Fisher-proportional": [2.0, 2.2, 2.1],
    "RankAdaptor": [2.0, 2.1, 2.2],
}


def rows(losses, parameters=1000):
    n = {method: len(values) for method, values in losses.items()}
    accuracies = {m: {"local_a": [0.5] * n[m], "local_b": [1 - x / 10 for x in losses[m]]} for m in METHODS}
    return [
        Row(m, losses[m], accuracies[m], {}, parameters if m != "no recovery" else 0, 2.0 if n[m] > 1 else 0.0)
        for m in METHODS
    ]


@pytest.fixture
def blocks():
    return {"llm-pruner-0.2": rows(LOSSES), "shortened-0.5": rows({**LOSSES, "LoRA, uniform": LOSSES["RankAdaptor"]})}


def test_differences_are_paired_by_seed_and_tell_wins_from_losses_and_ties(paper, blocks):
    found = paper.paired(blocks)
    by = {(d["block"], d["measure"], d["RankAdaptor less"]): d for d in found}
    first = by["llm-pruner-0.2", "loss", "LoRA, uniform"]
    test = stats.ttest_rel(LOSSES["RankAdaptor"], LOSSES["LoRA, uniform"])
    assert first["p"] == pytest.approx(test.pvalue)
    low, high = test.confidence_interval(0.95)
    assert first["difference"] - first["half width"] == pytest.approx(low)
    assert first["difference"] + first["half width"] == pytest.approx(high)
    assert first["better on"] == "3 of 3"
    verdicts = {who: by["llm-pruner-0.2", "loss", who]["verdict"] for who in METHODS[:-1]}
    assert verdicts == dict(zip(METHODS[:-1], ["win", "win", "loss", "win", "tie"], strict=True))
    assert by["llm-pruner-0.2", "average", "AdaLoRA"]["verdict"] == "loss"
    same = by["shortened-0.5", "loss", "LoRA, uniform"]
    assert (same["difference"], same["p"], same["verdict"]) == (0, 1, "tie")
    totals = {(t["measure"], t["RankAdaptor against"]): t for t in paper.counted(found)}
    against = totals["loss", "LoRA, uniform"]
    assert (against["wins"], against["ties"], against["losses"]) == (1, 1, 0)
    assert totals["loss", "AdaLoRA"]["losses"] == 2


def test_accuracies_that_differ_by_the_same_on_every_seed_are_a_tie(paper, blocks):
    coarse = {"local_a": [0.5, 0.6, 0.7]}
    found = [
        replace(
            row, accuracies={"local_a": [x + 0.02 for x in coarse["local_a"]]} if row.method == paper.OURS else coarse
        )
        for row in blocks["llm-pruner-0.2"]
    ]
    average = [d for d in paper.paired({"llm-pruner-0.2": found}) if d["measure"] == "average"]
    assert {(d["p"], d["p, Holm"], d["verdict"]) for d in average} == {(1, 1, "tie")}
    assert average[0]["difference"] == pytest.approx(0.02)


def test_holms_correction_is_that_of_the_textbook(paper):
    assert paper.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paper.holm([0.6, 0.7]) == [1, 1]


def test_the_table_states_tasks_average_loss_and_each_rows_share_of_the_budget(paper, blocks):
    lines = paper.table(blocks)
    assert [line["recovery"] for line in lines] == [*METHODS, *METHODS]
    ours = lines[5]
    assert list(ours) == ["block", "recovery", "a", "b", "average", "loss", "parameters", "of budget", "seconds"]
    half = stats.t.ppf(0.975, 2) * np.std(LOSSES["RankAdaptor"], ddof=1) / 3**0.5
    assert ours["loss"] == f"2.1000 ±{half:.4f}"
    assert ours["b"] == f"79.0 ±{10 * half:.1f}"
    assert ours["average"] == f"64.50 ±{5 * half:.2f}"
    assert (ours["parameters"], ours["of budget"]) == ("1,000", "100.0%")
    assert lines[0]["loss"] == "4.0000"


def test_a_row_over_the_budget_and_a_loss_to_uniform_miss_their_goals(paper, blocks):
    checks = paper.checks_of(blocks, paper.paired(blocks))
    assert [c["ok"] for c in checks.values()] == [True, True, True, True, True]
    over = [replace(row, parameters=1006) if row.method == "AdaLoRA" else row for row in blocks["shortened-0.5"]]
    worse = rows({**LOSSES, "RankAdaptor": [3.0, 3.1, 3.2]})
    bad = {"llm-pruner-0.2": worse, "shortened-0.5": over}
    checks = paper.checks_of(bad, paper.paired(bad))
    assert [c["ok"] for c in checks.values()] == [False, False, False, False, False]


@pytest.fixture
def data(tmp_path, texts, monkeypatch):
    """A data folder of the same layout, tiny."""
    folder = tmp_path / "root" / "shared" / "data"
    for name in ("alpaca", "wikitext2", "tasks"):
        (folder / name).mkdir(parents=True)
    (folder / "wikitext2" / "validation.txt").write_text("\n\n".join(texts * 2))
    for name, n in (("train", 40), ("validation", 6)):
        records = [{"instruction": f"say {i}", "input": "", "output": texts[i % 12][:80]} for i in range(n)]
        (folder / "alpaca" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    items = [{"q": f"{i}:", "o": ["rank", "head"], "gold": i % 2} for i in range(12)]
    for task in ("boolq", "piqa"):
        file = f"shared/data/tasks/{task}.jsonl"  # relative, as in the real ones
        (folder.parents[1] / file).write_text("".join(json.dumps(item) + "\n" for item in items))
        (folder / "tasks" / f"{task}.yaml").write_text(
            f"task: local_{task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{o}}'\n"
            "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}]\n"
        )
    monkeypatch.setenv("RANKADAPTOR_DATA", str(folder))
    return folder


@pytest.mark.parametrize("block", ["llm-pruner-0.2", "shortened-0.5"])
def test_a_block_is_searched_compared_and_not_run_again(
    paper, block, data, make_model, tokenizer, tmp_path, monkeypatch
):
    dense = make_model(num_hidden_layers=10, max_position_embeddings=512)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    size = paper.Size(2, 2, 3, steps=5, batch_size=2, length=300, records=40, validation=3, dtype="float32")
    recipe = paper.recipe_of(block, size, str(tmp_path / "dense"))
    first = paper.run_block(block, recipe, size, tmp_path / "folder", ("boolq", "piqa"))
    assert [row.method for row in first] == list(METHODS)
    assert set(first[-1].accuracies) == {"local_boolq", "local_piqa"}
    budget = first[1].parameters
    assert all(0.5 * budget < row.parameters <= 1.005 * budget for row in first[1:])
    monkeypatch.setattr(compare_module, "_recover_and_measure", lambda *args: pytest.fail("computed again"))
    assert paper.run_block(block, recipe, size, tmp_path / "folder", ("boolq", "piqa")) == first


def test_blocks_of_the_same_size_add_up_to_one_table(paper, blocks, tmp_path, monkeypatch):
    from benchmarks import report as results

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    size = paper.Size()
    paper.report(blocks, size, "paper_table")
    for block, found in blocks.items():
        assert paper.finished_block(block, size, tmp_path / "paper_table.json") == found
    assert paper.finished_block(block, replace(size, steps=6), tmp_path / "paper_table.json") == []
    assert paper.finished_block(block, size, tmp_path / "none.json") == []
    assert paper.finished_block("no such block", size, tmp_path / "paper_table.json") == []


@pytest.fixture
def spec(ablations):
    from benchmarks.tasks.recovery import Damage, Dense, TaskSpec

    dense = Dense("docs", 4, 32, heads=4, kv_heads=2, intermediate=48, training=TrainingConfig(6, 4, 3e-3))
    recovery = TrainingConfig(3, 2, 1e-2)
    return TaskSpec("tiny", dense, Damage("taylor", 0.4), recovery, candidates=(0, 2, 4, 6), budget="uniform:4")


def test_micro_batches_change_nothing_but_rounding(ablations, spec, tmp_path):
    found, widest = ablations.micro_batches(spec, tmp_path, steps=3)
    assert [row["micro batch"] for row in found] == [4, 8, 16]
    assert widest < 1e-5


def test_prunings_differ_by_setting_and_known_losses_are_not_computed_again(ablations, spec, tmp_path, monkeypatch):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = ablations.prunings(spec, tmp_path, 2, 2, tmp_path / "cache")
    assert [row["pruning"] for row in first] == list(ablations.PRUNINGS)
    assert len({row["values"][0][0] for row in first}) == 3
    monkeypatch.setattr(ablations.Losses, "__call__", _only_known(ablations.Losses.__call__))
    assert ablations.prunings(spec, tmp_path, 2, 2, tmp_path / "cache") == first


def _only_known(real):
    def call(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        assert self.n_computed == 0
        return found

    return call


def test_performance_models_learn_from_the_same_trials_and_gains_are_over_uniform(ablations, tmp_path):
    from benchmarks.tasks.synthetic import Synthetic

    task = Synthetic("tiny", smooth=True, noise=0.0, seed=9)
    losses = ablations.Losses(task, tmp_path / "losses.csv")
    found = ablations.performance_models(task, losses, 2, (5, 30))
    assert set(found) == {(name, n) for name in ablations.MODELS for n in (5, 30)}
    ours = found["ours", 30]
    assert min(ours["order"]) > 0.3
    best = task.losses([task.space.uniform()], [0], report=True)[0] - task.losses([task.optimum], [0], report=True)[0]
    assert 0 < np.mean(ours["gain"]) <= best
    rows = ablations.model_rows("tiny", found)
    less = np.subtract(ours["gain"], found["MLP 32-32-32", 30]["gain"]).mean()
    row = next(r for r in rows if (r["performance model"], r["trials"]) == ("ours", 30))
    assert row["gain less 32-32-32's"].startswith(f"{less:+.4f}")
