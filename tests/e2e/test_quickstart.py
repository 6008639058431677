"""`rankadaptor quickstart` as its user runs it: the real model, in new processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from rankadaptor_optuna.jobs.results import DENSE, NONE, OURS, UNIFORM

pytestmark = pytest.mark.e2e

# the command, but measured on a sixth of the report's text and tasks
COMMAND = """
import dataclasses, sys
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs.recipe import PRESETS
preset = PRESETS["quickstart"]
data = dataclasses.replace(preset.data, report_blocks=4)
evaluation = dataclasses.replace(preset.evaluation, report_limit=10)
PRESETS["quickstart"] = dataclasses.replace(preset, data=data, evaluation=evaluation)
sys.exit(main(["quickstart", *sys.argv[1:]]))
"""


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a small first run."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = quickstart("--out", str(out), "--trials", "3", "--steps", "2")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="quickstart", storage=f"sqlite:///{out / 'study.db'}").trials


def test_prints_the_table_and_a_verdict(first: tuple[Path, str]) -> None:
    for row in (DENSE, NONE, UNIFORM, OURS):
        assert f"\n{row} " in first[1]
    assert "continuation" in first[1]
    verdicts = ("beat uniform", "did NOT beat", "No difference", "recommends the uniform")
    assert any(verdict in first[1] for verdict in verdicts)


def test_writes_study_adapter_report_and_pictures(first: tuple[Path, str]) -> None:
    out, _ = first
    assert [t.state.name for t in trials(out)] == ["COMPLETE"] * 3
    assert len(set(trials(out)[0].params.values())) == 1, "trial 0 is uniform"
    for name in ("report.md", "ranks.png", "progress.png", "settings.json", "pruned/model.safetensors"):
        assert (out / name).stat().st_size > 100, name
    written = [path.name for path in out.rglob("*") if path.is_file()]
    assert not [name for name in written if name.endswith((".bin", ".pt", ".pkl", ".part"))]


def test_pruning_hurt_and_recovery_helped(first: tuple[Path, str]) -> None:
    rows = json.loads((first[0] / "compare" / "compare.json").read_text())["rows"]
    losses = {row["method"]: row["losses"] for row in rows}
    assert losses[DENSE][0] < max(losses[UNIFORM] + losses[OURS]) < losses[NONE][0]


def test_the_adapter_loads_on_the_pruned_model_in_a_new_process(first: tuple[Path, str]) -> None:
    out, _ = first
    code = f"""
import torch
import rankadaptor_optuna
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained({str(out / "pruned")!r})
tokenizer = AutoTokenizer.from_pretrained({str(out / "pruned")!r})
ids = tokenizer("The with statement is used to", return_tensors="pt").input_ids
with torch.no_grad():
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, {str(out / "adapter")!r})
    after = model(ids).logits
print(len({{m.r["default"] for m in model.modules() if hasattr(m, "lora_A")}}), float((before - after).abs().max()) > 0)
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    n_ranks, changed = lines[0].split()
    report = (out / "report.md").read_text()
    assert changed == "True"
    assert int(n_ranks) > 1 or "recommends the uniform" in report
    assert lines[1].startswith("The with statement is used to")


def test_running_again_recomputes_nothing(first: tuple[Path, str]) -> None:
    out, stdout = first
    before = {path: path.stat().st_mtime_ns for path in (*out.rglob("*.safetensors"), *out.rglob("results.json"))}
    finished = [t.datetime_complete for t in trials(out)]
    again = quickstart("--out", str(out), "--trials", "3", "--steps", "2")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [t.datetime_complete for t in trials(out)] == finished
    table = [text.split("\n\n", 1)[1].split("Done in")[0] for text in (stdout, again.stdout)]
    assert table[0] == table[1]


def test_other_settings_are_refused_in_one_line(first: tuple[Path, str]) -> None:
    out, _ = first
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    refused = quickstart("--out", str(out), "--trials", "3", "--steps", "2", "--ratio", "0.3")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "other settings" in refused.stderr
    assert "0.25" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_impossible_budget_writes_nothing(tmp_path: Path) -> None:
    refused = quickstart("--out", str(tmp_path / "out"), "--budget", "1000")
    assert refused.returncode == 2
    assert "below the cheapest configuration" in refused.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
