"""One worker of two processes, as a launcher starts them, beside one of a single process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

pytestmark = pytest.mark.e2e

# what `accelerate launch` runs for several GPUs; without one it wants MPI
LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = """
import os, sys
from pathlib import Path
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.jobs.search import search

calls, real = [], Examples.batch
def batch(self, rows):
    calls.append(rows)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise OSError("disk gone")
    return real(self, rows)

Examples.batch = batch
search(Recipe.load(sys.argv[1]), Path(sys.argv[2]), trials=2)
"""


@pytest.fixture
def recipe(make_model, tokenizer, tmp_path: Path) -> Path:
    """Instruction records of differing length in batches of three: shares that are never alike."""
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    records = [{"instruction": f"Say {'it ' * (i % 5)}", "output": f"{i} " * (1 + i % 7)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "recipe.toml").write_text(
        f"""
model = "{tmp_path / "dense"}"
pruning = {{ratio = 0.2, multiple_of = 8, n_samples = 4, sample_length = 32}}
space = {{candidates = [2, 4, 8], budget = "uniform:4"}}
data = {{train = "{tmp_path / "data.jsonl"}", block_length = 256}}
training = {{steps = 4, batch_size = 3, learning_rate = 0.01}}
"""
    )
    return tmp_path / "recipe.toml"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=120, check=False)


def trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{out / 'study.db'}").trials


def test_two_processes_do_what_one_does(recipe: Path, tmp_path: Path) -> None:
    search = ["rankadaptor_optuna.cli", "search", str(recipe), "--trials", "3", "--out"]
    one = run(*search, str(tmp_path / "one"))
    two = run(*LAUNCHER, "-m", *search, str(tmp_path / "two"))
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    values = [[t.value for t in trials(tmp_path / name)] for name in ("one", "two")]
    assert len(values[0]) == len(values[1]) == 3
    assert values[1] == pytest.approx(values[0], abs=1e-4)
    assert len(set(values[0])) > 1
    assert two.stdout.count("Study 'search'") == two.stdout.count("arguments of peft.LoraConfig") == 1
    answers = [json.loads((tmp_path / name / "recommendation.json").read_text()) for name in ("one", "two")]
    assert answers[0]["ranks"] == answers[1]["ranks"]


def test_where_one_process_fails_the_trial_fails_on_both_and_the_next_one_runs(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(*LAUNCHER, str(tmp_path / "script.py"), str(recipe), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    states = [t.state.name for t in trials(tmp_path / "out")]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials(tmp_path / "out")[0].user_attrs["fail_reason"] == (
        "RuntimeError: another process of this recovery failed."
    )
