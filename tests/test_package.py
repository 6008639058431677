from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankadaptor_optuna

HEAVY = ("torch", "transformers", "peft", "lm_eval", "datasets", "pydantic")


@pytest.mark.parametrize(
    "line",
    [
        "import rankadaptor_optuna",
        "import rankadaptor_optuna.space",
        "from rankadaptor_optuna import RankAdaptorSampler",
        "from rankadaptor_optuna import PerformanceModel, RankSpace; PerformanceModel(RankSpace(4), mode='paper')",
    ],
)
def test_importing_the_package_loads_nothing_heavy(line):
    code = f"import sys; {line}; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_sampler_needs_neither_transformers_nor_peft():
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY[1:])
    code = f"""
import sys; {hidden}
import optuna
from rankadaptor_optuna import RankAdaptorSampler, RankSpace, create_study, recommend
space = RankSpace(4, budget="uniform:8")
study = create_study(space=space)
study.optimize(lambda trial: float(sum(space.suggest(trial).values())), n_trials=3)
print(recommend(study).evidence.n_trials)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3\n"


@pytest.mark.parametrize("name", rankadaptor_optuna.__all__)
def test_every_public_name_resolves(name):
    found = getattr(rankadaptor_optuna, name)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(rankadaptor_optuna)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'rankadaptor_optuna' has no attribute 'Nonsense'"):
        rankadaptor_optuna.Nonsense  # noqa: B018


# as tools do that ask whether a module exists
_LOOK = "import importlib.util; importlib.util.find_spec('transformers.models.auto.modeling_auto')"


def test_after_the_import_pruned_checkpoints_open_in_either_order(model, tokenizer, texts, tmp_path):
    from rankadaptor_optuna.pruning import prune

    prune(model, tokenizer, ratio=0.15, calibration=texts, multiple_of=8, n_samples=4, sample_length=32).save(
        tmp_path / "model"
    )
    imports = ["import rankadaptor_optuna", "from transformers import AutoModelForCausalLM"]
    code = f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})).__name__)"
    processes = [
        subprocess.Popen([sys.executable, "-c", "\n".join([*order, code])], stdout=subprocess.PIPE, text=True)
        for order in (imports, imports[::-1], [imports[0], _LOOK, imports[1]])
    ]
    opened = [process.communicate()[0].split()[-1] for process in processes]
    assert opened == ["PrunedLlamaForCausalLM"] * 3


def test_code_of_models_and_data_sets_is_refused_explicitly():
    call = re.compile(r"(?:Auto\w+\.from_pretrained|load_dataset)\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
    files = Path(rankadaptor_optuna.__file__).parent.rglob("*.py")
    calls = [found for file in files if file.parent.name != "views" for found in call.findall(file.read_text())]
    assert len(calls) >= 6
    assert [each for each in calls if not re.search(r"trust_remote_code\"?(=|: )False", each)] == []
