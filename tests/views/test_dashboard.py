from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna_dashboard import get_note, save_note

from rankadaptor_optuna import RankSpace, publish_dashboard, recommend
from rankadaptor_optuna.database.attributes import CONVERGED_ATTR, RECIPE_ATTR, SENSITIVITY_ATTR
from rankadaptor_optuna.ranks import LoraSettings
from rankadaptor_optuna.views.dashboard import HEAT_MAP_ID, PROGRESS_ID, RANKS_ID


def published(study):
    """The ids of the study's figures."""
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return {key.split(":")[2] for key in attrs if key.startswith("dashboard:plot_data:")}


@pytest.fixture
def config_of(monkeypatch):
    """Runs the note's code and returns the arguments that it gives to ``LoraConfig``."""

    def run(note):
        monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(LoraConfig=dict))
        code = re.search(r"```python\n(.*?)```", note, re.S)[1]
        assert max(map(len, code.splitlines())) <= 90  # the page does not wrap code
        names: dict = {}
        exec(code, names)
        return names["config"]

    return run


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_study_in_a_database_gets_three_figures_and_a_note(make_study, direction, tmp_path):
    study = make_study(5, direction=direction, storage=f"sqlite:///{tmp_path / 'study.db'}")
    publish_dashboard(study)
    assert published(study) == {HEAT_MAP_ID, PROGRESS_ID, RANKS_ID}
    assert recommend(study).evidence.statement in get_note(study)


@pytest.mark.parametrize("known", [True, False], ids=["with a space", "drop-in"])
def test_the_trials_are_read_once(make_study, drop_in, known, monkeypatch):
    study = make_study() if known else drop_in()
    readings, read = [], study._storage.get_all_trials
    monkeypatch.setattr(
        study._storage, "get_all_trials", lambda *args, **kw: readings.append(args) or read(*args, **kw)
    )
    publish_dashboard(study)
    assert len(readings) == 1


def test_one_trial_is_enough(make_study):
    study = make_study(1)
    publish_dashboard(study)
    assert len(published(study)) == 3


def test_the_note_states_prediction_cost_and_each_layers_ranks(make_study, space):
    study = make_study()
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(space.distributions(), [1, 2, -1, 3, 4, 1], strict=True)))
    study.set_user_attr(CONVERGED_ATTR, "Converged after 6 trials.")
    publish_dashboard(study)
    found, text = recommend(study), get_note(study)
    assert f"Predicted score: {found.predicted:.5g}" in text
    assert f"Trainable parameters: {found.cost:,.0f} of {space.budget:,.0f}" in text
    assert "\nConverged after 6 trials.\n" in text
    assert "| layer | rank | uniform | weights pruned | share of the sensitivity |" in text
    rows = re.findall(r"^\| (\d+) \| (\d+) \| 8 \| ([\d.]+)% \| ([-\d.]+)% \|$", text, re.M)
    assert {int(layer): int(rank) for layer, rank, *_ in rows} == found.ranks
    assert [float(pruned) / 100 for *_, pruned, _ in rows] == pytest.approx(space.profile)
    assert [share for *_, share in rows] == ["10.0", "20.0", "-10.0", "30.0", "40.0", "10.0"]
    assert "Not searched: layers 0 (rank 8), 7 (rank 8)" in text


@pytest.mark.parametrize("lora", [{}, {"alpha_ratio": 1.5}, {"alpha": 16, "targets": ["q_proj"]}])
def test_the_notes_code_has_the_arguments_of_the_recommended_config(make_study, config_of, lora):
    study = make_study(4)
    study.set_user_attr(RECIPE_ATTR, {"lora": lora})
    publish_dashboard(study)
    found = recommend(study)
    assert config_of(get_note(study)) == found.all_ranks.lora_arguments(LoraSettings.of(lora))


def test_the_note_by_sublayer_names_each(make_study, by_sublayer, config_of):
    study = make_study(5, by_sublayer)
    publish_dashboard(study)
    text, found = get_note(study), recommend(study)
    rows = re.findall(r"^\| (\d\.\w+) \| (\d+) \| 4 \| ([\d.]+)% \|$", text, re.M)
    assert {module: int(rank) for module, rank, _ in rows} == found.ranks
    assert "Not searched: sublayers 0.self_attn (rank 8), 0.mlp (rank 8), 7.self_attn" in text
    assert 0 in found.ranks.values()
    assert config_of(text) == found.all_ranks.lora_arguments()


def test_publishing_again_replaces_figures_and_our_part_of_the_note_only(make_study):
    study = make_study(2)
    save_note(study, "Mine, *above*.")
    publish_dashboard(study)
    save_note(study, get_note(study) + "\nMine, below.")
    study.add_trials(make_study(5).trials[2:])
    publish_dashboard(study)
    text = get_note(study)
    assert text.startswith("Mine, *above*.")
    assert text.endswith("Mine, below.")
    assert text.count("## Recommended ranks") == 1
    assert "from 5 trials" in text or "After 5 trials" in text
    before = dict(study._storage.get_study_system_attrs(study._study_id))
    publish_dashboard(study)
    assert study._storage.get_study_system_attrs(study._study_id) == before


@pytest.mark.parametrize("known", [True, False], ids=["with a space", "drop-in"])
def test_without_finished_trials_the_note_says_so(make_study, known):
    study = make_study(0) if known else optuna.create_study()
    publish_dashboard(study)
    assert "no finished trial" in get_note(study)
    assert published(study) == set()


def test_several_objectives_get_the_heat_map_and_an_explanation(drop_in):
    study = drop_in(directions=["maximize", "minimize"])
    publish_dashboard(study)
    assert published(study) == {HEAT_MAP_ID}
    assert "needs one objective" in get_note(study)


def test_a_drop_in_study_gets_its_sum_of_ranks_and_code_where_layers_are_known(drop_in):
    study = drop_in()
    publish_dashboard(study)
    assert "| layer | rank |\n" in get_note(study)
    assert "Sum of ranks" in get_note(study)
    assert "LoraConfig" in get_note(study)
    study = drop_in(tuple(f"{kind}_{i}_r" for i in range(3) for kind in "ab"))
    publish_dashboard(study)
    assert "LoraConfig" not in get_note(study)


def test_the_gain_of_verification_trials_is_in_the_note(make_study, space):
    study = make_study()
    recommend(study, verify=1, seeds=2)
    study.optimize(lambda trial: sum(i * rank for i, rank in space.suggest(trial).items()) + 1000.0, n_trials=4)
    publish_dashboard(study)
    assert "Measured on 2 fresh seeds" in get_note(study)


def test_a_study_without_ranks_is_refused():
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=2)
    with pytest.raises(ValueError, match="no rank parameters"):
        publish_dashboard(study)


def test_importing_it_loads_neither_plotly_nor_optuna_dashboard():
    code = "import sys, rankadaptor_optuna.views.dashboard; print({'plotly', 'optuna_dashboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("missing", ["plotly", "optuna_dashboard"])
def test_without_the_extra_it_says_what_to_install(make_study, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing} is not installed; it belongs to the extra 'dashboard'"):
        publish_dashboard(make_study(0))


def test_without_a_budget_the_note_has_the_cost_of_uniform_ranks_too(make_study):
    space = RankSpace(4, (2, 4, 8), costs=[100, 100, 200, 200])
    study = make_study(5, space)
    publish_dashboard(study)
    cost = recommend(study).cost
    assert f"* Trainable parameters: {cost:,.0f}, no budget (uniform: 4,800)." in get_note(study)
