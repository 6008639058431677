from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from rankadaptor_optuna.jobs.recipe import PRESETS, Evaluation, Recipe
from rankadaptor_optuna.pruning import llm_pruner_preset
from rankadaptor_optuna.recovery.lora import lora_config
from rankadaptor_optuna.recovery.train import learning_rate_factor

FULL = """
model = "some/model"
seed = 3
report_every = 2
[pruning]
method = "slimgpt"
ratio = 0.3
[space]
candidates = [0, 4, 8]
budget = 100000
granularity = "sublayer"
[data]
train = "alpaca.jsonl"
mask_prompt = false
[training]
steps = 20
learning_rate = 1
micro_batch_size = 2
[lora]
dropout = 0.1
targets = ["q_proj", "v_proj"]
[evaluation]
tasks = {arc_easy = 1, piqa = 0.5}
metric = "margin"
limit = 100
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "recipe.toml").write_text(text)
        return tmp_path / "recipe.toml"

    return write


def test_a_file_changes_what_it_names_and_leaves_the_rest(write):
    recipe = Recipe.load(write(FULL))
    assert (recipe.model, recipe.seed, recipe.report_every) == ("some/model", 3, 2)
    assert (recipe.pruning.method, recipe.pruning.ratio, recipe.pruning.n_samples) == ("slimgpt", 0.3, None)
    assert (recipe.space.candidates, recipe.space.budget) == ((0, 4, 8), 100000)
    assert recipe.training.learning_rate == 1
    assert recipe.training.batch_size == PRESETS["quick"].training.batch_size
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.evaluation == Evaluation({"arc_easy": 1, "piqa": 0.5}, "margin", limit=100)
    listed = Recipe.load(write('[evaluation]\ntasks = ["arc_easy"]'))
    assert listed.evaluation == Evaluation(("arc_easy",))
    assert Recipe.load(write("")) == Recipe() == PRESETS["quick"]


def test_a_preset_is_what_the_other_keys_change(write):
    recipe = Recipe.load(write('preset = "paper"\n[training]\nsteps = 10'))
    assert (recipe.training.steps, recipe.training.epochs) == (10, None)
    assert recipe.training.batch_size == 64
    assert recipe.lora.dropout == 0.05


def test_the_papers_preset_is_llm_pruners_published_recovery(tokenizer):
    paper = PRESETS["paper"]
    training = paper.training.for_examples(49_760)  # alpaca-cleaned less its 2,000 validation records
    assert training.steps == 1555
    assert (training.batch_size, training.micro_batch_size, training.learning_rate) == (64, 4, 1e-4)
    rates = [learning_rate_factor(step, training) for step in (0, 99, 100, 1554)]
    assert rates == pytest.approx([1 / 100, 1, 1, 1 / 1455])  # as transformers' linear schedule with 100 warm-up steps
    assert (paper.data.train, paper.data.block_length, paper.data.mask_prompt) == ("yahma/alpaca-cleaned", 256, True)
    config = lora_config({0: 8, 1: 2}, paper.lora)
    assert (config.lora_alpha, set(config.alpha_pattern.values()), config.lora_dropout) == (16, {16}, 0.05)
    assert config.target_modules == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert paper.pruning.ratio == llm_pruner_preset(32)["ratio"]
    assert asdict(paper.pruning).items() >= llm_pruner_preset(32).items()
    assert len(paper.evaluation.tasks) == 7


@pytest.mark.parametrize("text", ["", FULL, 'preset = "paper"', "[training]\nepochs = 0.5"])
def test_json_and_back_is_the_same(write, text):
    recipe = Recipe.load(write(text))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 1", "stepz: no such setting; there are model, dtype, device, seed"),
        ("[training]\nstepz = 1", "training.stepz: no such setting; there are steps, batch_size"),
        ("[training]\nsteps = 0", "training.steps must be positive, got 0"),
        ("[training]\nsteps = 1.5", "training.steps: expected a valid integer, got 1.5"),
        ("[training]\nsteps = true", "training.steps: expected a valid integer, got True"),
        ('[training]\nlearning_rate = "high"', "training.learning_rate: expected a valid number, got 'high'"),
        ("[training]\nsteps = 5\nepochs = 1", "training.epochs: give steps or epochs, not both"),
        ("[training]\nepochs = 0", "training.epochs must be positive, got 0"),
        ("[training]\nwarmup = -0.1", "training.warmup must not be negative, got -0.1"),
        ("[lora]\nalpha = 0", "lora.alpha must be positive, got 0"),
        ("[lora]\nalpha_ratio = -2", "lora.alpha_ratio must be positive, got -2"),
        ('device = "gpu"', "device must be cpu, cuda, cuda:NUMBER or mps, got 'gpu'"),
        ("training = 3", "training: expected an object, got 3"),
        ("[pruning]\nratio = 1.0", "pruning.ratio must lie between 0 and 1, got 1.0"),
        ('[pruning]\ncalibration = ["a"]', "pruning.calibration: expected a valid string, got \\['a'\\]"),
        ("[space]\ncandidates = [8, 4]", "strictly increasing"),
        ('[space]\nbudget = "much"', "'much'"),
        ('[space]\ngranularity = "head"', "space.granularity: expected 'layer' or 'sublayer', got 'head'"),
        ("[data]\nblock_length = 0", "data.block_length must be at least 2, got 0"),
        ("[lora]\ndropout = 1.0", r"lora.dropout must lie in \[0, 1\), got 1.0"),
        ('[evaluation]\ntasks = "arc_easy"', "evaluation.tasks: expected a valid array or an object, got 'arc_easy'"),
        ('[evaluation]\ntasks = {arc_easy = "high"}', "evaluation.tasks: expected"),
        ("[evaluation]\ntasks = {arc_easy = 0}", "evaluation.tasks must have positive weights"),
        ('[evaluation]\nmetric = "f1"', "evaluation.metric: expected 'loss', 'margin' or 'accuracy', got 'f1'"),
        ('[evaluation]\nmetric = "margin"', "evaluation.metric 'margin' needs tasks"),
        ("[evaluation]\nlimit = 0", "evaluation.limit must be at least 1, got 0"),
        ("[evaluation]\nnum_fewshot = -1", "evaluation.num_fewshot must be at least 0, got -1"),
        ("report_every = 0", "report_every must be at least 1, got 0"),
        ("report_every = 1\nreport_items = true", "report_items: .* not both"),
        (
            'report_items = true\n[evaluation]\ntasks = ["a"]\nmetric = "margin"',
            "report_items needs metric 'loss', got 'margin'",
        ),
        (
            'pruner = "wilcoxon"\nreport_every = 1',
            "pruner 'wilcoxon' .*; set report_items",
        ),
        ('pruner = "hyperband"', "pruner 'hyperband' compares what report_every reports; set report_every"),
        ('pruner = "random"', "pruner: expected 'median', 'hyperband' or 'wilcoxon', got 'random'"),
        ("seed = -1", "seed must be at least 0, got -1"),
        ('dtype = "int8"', "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ('preset = "slow"', "preset: no recipe named 'slow'; there are quick, quickstart, paper"),
        ("model = ", "cannot read the recipe .*recipe.toml"),
    ],
)
def test_a_key_that_is_unknown_or_impossible_is_named(write, text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load(write(text))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the recipe .*nothing\.toml"):
        Recipe.load(tmp_path / "nothing.toml")


def test_every_tenth_record_is_kept_for_the_score_unless_other_data_is_named(tmp_path):
    train, other = tmp_path / "train.jsonl", tmp_path / "other.txt"
    train.write_text("".join(json.dumps({"instruction": str(i), "output": "x"}) + "\n" for i in range(25)))
    other.write_text("one\n\ntwo\n")
    recipe = Recipe.from_dict({"data": {"train": str(train)}})
    parts = recipe.read_data()
    assert [r["instruction"] for r in parts.validation] == ["9", "19"]
    assert [r["instruction"] for r in parts.report] == ["8", "18"]
    assert len(parts.train) == 21
    recipe = Recipe.from_dict({"data": {"train": str(train), "validation": str(other)}})
    parts = recipe.read_data()
    assert [len(part) for part in (parts.train, parts.validation, parts.report)] == [23, 2, 2]
    with (
        pytest.warns(UserWarning, match="only the first 5 of 25 records"),
        pytest.raises(ValueError, match=r"data\.validation: too few records"),
    ):
        Recipe.from_dict({"data": {"train": str(train), "limit": 5}}).read_data()


def test_held_out_data_that_is_the_training_data_is_refused_and_shared_records_are_counted(tmp_path):
    for name, numbers in (("train", range(20)), ("copy", range(19, -1, -1)), ("other", range(19, 39))):
        (tmp_path / name).write_text("\n\n".join(f"text {i}" for i in numbers))
    data = {"train": str(tmp_path / "train")}
    for part in ("validation", "report"):
        with pytest.raises(ValueError, match=rf"1[89] of the 20 records of data\.{part} are in the train data too"):
            Recipe.from_dict({"data": {**data, part: str(tmp_path / "copy")}}).read_data()
    both = {"validation": str(tmp_path / "other"), "report": str(tmp_path / "other")}
    with (
        pytest.warns(UserWarning, match=r"1 of the 20 records of data\.validation are in the train data too"),
        pytest.raises(ValueError, match=r"20 of the 20 records of data\.validation are in the report data too"),
    ):
        Recipe.from_dict({"data": {**data, **both}}).read_data()


def test_the_objective_has_the_recipes_settings(model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"text number {i} " * 9 for i in range(30)))
    recipe = Recipe.from_dict(
        {
            "seed": 7,
            "data": {"train": str(tmp_path / "text.txt"), "block_length": 32},
            "space": {"candidates": [2, 4], "budget": "uniform:4", "unpruned_rank": -1},
            "lora": {"targets": ["q_proj"], "alpha": 3},
            "training": {"epochs": 0.5},
        }
    )
    job = recipe.objective(model, tokenizer)
    assert (job.seed, job.training.steps) == (7, math.ceil(len(job.train) / 4))
    assert job.space.costs == (64,) * 4
    with job.recovered(job.space.uniform()) as adapted:
        adapters = {name.split(".")[6] for name, p in adapted.named_parameters() if "lora_A" in name}
        scalings = {m.scaling["default"] for m in adapted.modules() if getattr(m, "lora_A", None)}
    assert adapters == {"q_proj"}
    assert scalings == {3 / 4}


def test_the_model_is_on_the_recipes_device_or_refused(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = Recipe(device="cpu").open_model(tmp_path)
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    with pytest.raises(ValueError, match="cannot put the model on device 'cuda:99'"):
        Recipe(device="cuda:99").open_model(tmp_path)


def test_the_example_is_the_default_in_full():
    example = Path(__file__).parents[2] / "examples" / "recipe.toml"
    assert Recipe.load(example) == Recipe()


def test_without_pydantic_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ImportError, match="pydantic is not installed; it belongs to the extra 'llm'"):
        Recipe.from_dict({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"block_length": 1}}, "data.block_length must be at least 2"),
        ({"space": {"unpruned_rank": -5}}, "space.unpruned_rank must be at least 0, or -1"),
        ({"lora": {"alpha": float("inf")}}, "lora.alpha must be finite"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate must be finite"),
    ],
)
def test_settings_that_no_trial_can_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(settings)
