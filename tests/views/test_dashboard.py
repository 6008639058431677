"""What publish_dashboard writes to a study, and how serve fails."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import Trial
from optuna_dashboard import get_note, save_note

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, publish_dashboard, recommend
from rankadaptor_optuna.attributes import CONVERGED_ATTR, SENSITIVITY_ATTR
from rankadaptor_optuna.views.dashboard import HEAT_MAP_ID, HISTORY_ID, RANKS_ID, serve
from rankadaptor_optuna.views.figures import history

SPACE = RankSpace(
    8,
    budget="uniform:8",
    layers=range(1, 7),
    costs=[100, 110, 120, 120, 110, 100],
    fixed_ranks={0: 8, 7: 8},
    fixed_cost=1600,
    profile=[0.1, 0.2, 0.3, 0.3, 0.2, 0.1],
)


def score(ranks: dict[int, int]) -> float:
    return sum(rank * (layer - 3) for layer, rank in ranks.items()) / 100


def with_space(
    n_trials: int, *, direction: str = "maximize", storage: str | None = None, space: RankSpace = SPACE
) -> optuna.Study:
    study = optuna.create_study(
        storage=storage, direction=direction, sampler=RankAdaptorSampler(space, prior=None, seed=0)
    )
    study.optimize(lambda trial: score(space.suggest(trial)), n_trials=n_trials)
    return study


def drop_in(objective: Callable[[Trial], float | tuple[float, float]], **kwargs: object) -> optuna.Study:
    study = optuna.create_study(sampler=RankAdaptorSampler(prior=None, seed=0), **kwargs)
    study.optimize(objective, n_trials=6)
    return study


def eight_ranks(trial: Trial) -> float:
    return score({i: trial.suggest_int(f"r_{i}", 1, 8) for i in range(8)})


def figures(study: optuna.Study) -> dict[str, dict]:
    """The published figures as optuna-dashboard's page reads them."""
    attrs = study._storage.get_study_system_attrs(study._study_id)
    chunks: dict[str, dict[int, str]] = {}
    for key, value in attrs.items():
        if key.startswith("dashboard:plot_data:"):
            _, _, name, number = key.split(":")
            chunks.setdefault(name, {})[int(number)] = value
    return {name: json.loads("".join(text for _, text in sorted(parts.items()))) for name, parts in chunks.items()}


def traces(figure: dict) -> dict[str, dict]:
    return {trace.get("name", trace["type"]): trace for trace in figure["data"]}


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_a_study_gets_three_figures_and_a_note(direction: str, storage: str | None, tmp_path: Path) -> None:
    study = with_space(5, direction=direction, storage=storage and f"sqlite:///{tmp_path / 'study.db'}")
    publish_dashboard(study)
    assert figures(study).keys() == {HEAT_MAP_ID, HISTORY_ID, RANKS_ID}
    assert recommend(study).evidence.statement in get_note(study)


def test_one_trial_is_enough() -> None:
    study = with_space(1)
    publish_dashboard(study)
    assert len(figures(study)) == 3


def test_the_note_states_prediction_cost_and_each_layers_ranks() -> None:
    study = with_space(6)
    publish_dashboard(study)
    found, text = recommend(study), get_note(study)
    assert f"Predicted score: {found.predicted:.5g}" in text
    assert f"Trainable parameters: {found.cost:,.0f} of {SPACE.budget:,.0f}" in text
    rows = re.findall(r"^\| (\d+) \| (\d+) \| 8 \| ([\d.]+)% \|$", text, re.M)
    assert {int(layer): int(rank) for layer, rank, _ in rows} == found.ranks
    assert [float(share) / 100 for *_, share in rows] == pytest.approx(SPACE.profile)
    assert "Not searched: layers 0 (rank 8), 7 (rank 8)" in text


def test_the_notes_code_builds_the_recommended_config() -> None:
    pytest.importorskip("peft")
    study = with_space(4, space=RankSpace(30, (0, 4, 8), "uniform:4"))
    publish_dashboard(study)
    code = re.search(r"```python\n(.*?)```", get_note(study), re.S)[1]
    assert max(map(len, code.splitlines())) <= 90  # the note does not wrap code
    names: dict = {}
    exec(code, names)
    found = recommend(study)
    assert names["config"].rank_pattern == found.rank_pattern
    assert names["config"].alpha_pattern == found.alpha_pattern
    assert names["config"].layers_to_transform == [layer for layer, rank in found.all_ranks.items() if rank > 0]


@pytest.mark.parametrize("lora", [{"alpha_ratio": 1.5}, {"alpha": 16, "targets": ["q_proj"]}])
def test_the_notes_code_has_the_recipes_alpha_and_targets(lora) -> None:
    pytest.importorskip("peft")
    study = with_space(4)
    study.set_user_attr("rankadaptor:recipe", {"lora": lora})
    publish_dashboard(study)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", get_note(study), re.S)[1], names)
    found = recommend(study)
    assert names["config"].alpha_pattern == found.alpha_pattern
    assert set(found.alpha_pattern.values()) == {16} or found.alpha_pattern[r"layers\.0\..*"] == 12
    if "targets" in lora:
        assert names["config"].target_modules == {"q_proj"}


def by_sublayer(n_trials: int = 5) -> tuple[optuna.Study, RankSpace]:
    parts = {"costs": [10, 20] * 6, "profile": [0.1, 0.4] * 6, "granularity": "sublayer"}
    space = RankSpace(8, (0, 4, 8), "uniform:4", layers=range(1, 7), fixed_ranks={0: 8, 7: 8}, **parts)
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(space, prior=None, seed=0))
    study.optimize(lambda trial: float(sum(list(space.suggest(trial).values())[1::2])), n_trials=n_trials)
    return study, space


def test_attention_and_mlp_stand_side_by_side_at_their_layer() -> None:
    study, space = by_sublayer()
    publish_dashboard(study)
    shown, found = figures(study), recommend(study)
    for name, part in space.series.items():
        bars = [trace for trace in shown[RANKS_ID]["data"] if trace.get("offsetgroup") == name]
        assert [bar["name"] for bar in bars] == [name, "not searched", "weights pruned"]
        assert bars[0]["x"] == [*space.layers]
        assert bars[0]["y"] == [found.ranks[module] for module in space.modules[part]]
        assert (bars[1]["x"], bars[1]["y"]) == ([0, 7], [8, 8])
        assert bars[2]["y"] == [100 * share for share in space.profile[part]]
    assert shown[RANKS_ID]["layout"]["barmode"] == "group"
    cells = shown[HEAT_MAP_ID]["data"][0]
    assert cells["y"] == [*space.modules[::2], *space.modules[1::2]]
    assert np.reshape(decoded(cells["z"]), (12, 5))[:, 0].tolist() == [4] * 12
    assert np.reshape(decoded(cells["z"]), (12, 5))[6:].T.tolist() == history(study).ranks[:, 1::2].tolist()


def test_the_note_by_sublayer_names_each_and_its_code_builds_the_recommended_config() -> None:
    pytest.importorskip("peft")
    from rankadaptor_optuna.recovery.lora import lora_config

    study, _ = by_sublayer()
    publish_dashboard(study)
    text, found = get_note(study), recommend(study)
    rows = re.findall(r"^\| (\d\.\w+) \| (\d+) \| 4 \| ([\d.]+)% \|$", text, re.M)
    assert {module: int(rank) for module, rank, _ in rows} == found.ranks
    assert "Not searched: sublayers 0.self_attn (rank 8), 0.mlp (rank 8), 7.self_attn" in text
    assert 0 in found.ranks.values()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    expected = lora_config(found.all_ranks)
    for field in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "target_modules", "r"):
        assert getattr(names["config"], field) == getattr(expected, field), field


def test_publishing_again_replaces_figures_and_our_part_of_the_note_only() -> None:
    study = with_space(2)
    save_note(study, "Mine, *above*.")
    publish_dashboard(study)
    save_note(study, get_note(study) + "\nMine, below.")
    study.optimize(lambda trial: score(SPACE.suggest(trial)), n_trials=3)
    publish_dashboard(study)
    text = get_note(study)
    assert text.startswith("Mine, *above*.")
    assert text.endswith("Mine, below.")
    assert text.count("## Recommended ranks") == 1
    assert "from 5 trials" in text or "After 5 trials" in text
    assert len(figures(study)) == 3


def test_publishing_twice_changes_nothing() -> None:
    study = with_space(3)
    publish_dashboard(study)
    before = dict(study._storage.get_study_system_attrs(study._study_id))
    publish_dashboard(study)
    assert study._storage.get_study_system_attrs(study._study_id) == before


@pytest.mark.parametrize("space", [SPACE, None], ids=["with a space", "drop-in"])
def test_without_finished_trials_the_note_says_so(space: RankSpace | None) -> None:
    study = optuna.create_study(sampler=RankAdaptorSampler(space, prior=None))
    publish_dashboard(study)
    assert "no finished trial" in get_note(study)
    assert figures(study) == {}


def test_verification_trials_are_on_no_figure_and_their_gain_is_in_the_note() -> None:
    study = with_space(6)
    recommend(study, verify=1, seeds=2)

    def verified(trial: Trial) -> float:
        return score(SPACE.suggest(trial)) + 1000

    study.optimize(verified, n_trials=4)
    h = history(study)
    assert h.numbers == tuple(range(6))
    assert np.flatnonzero(h.is_uniform).tolist() == [0]
    assert h.scores is not None
    assert h.scores.max() < 1000
    publish_dashboard(study)
    assert "Confirmed on 2 fresh seeds" in get_note(study)


def test_the_note_says_that_the_search_has_converged() -> None:
    study = with_space(2)
    publish_dashboard(study)
    assert "Converged" not in get_note(study)
    study.set_user_attr(CONVERGED_ATTR, "Converged after 2 trials.")
    publish_dashboard(study)
    assert "\nConverged after 2 trials.\n" in get_note(study)


def test_the_note_and_the_ranks_tell_each_layers_share_of_the_sensitivity() -> None:
    study = with_space(3)
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(SPACE.distributions(), [1, 2, -1, 3, 4, 1], strict=True)))
    publish_dashboard(study)
    shown = figures(study)[RANKS_ID]
    bars = {trace["name"]: trace for trace in shown["data"]}
    assert bars["share of the sensitivity"]["y"] == [10, 20, -10, 30, 40, 10]
    assert bars["weights pruned"]["y"] == [100 * share for share in SPACE.profile]
    panels = [shown["layout"][axis]["domain"] for axis in ("yaxis2", "yaxis3", "yaxis")]
    assert [bars[name]["yaxis"] for name in ("weights pruned", "share of the sensitivity")] == ["y2", "y3"]
    assert all(below[1] < above[0] for below, above in itertools.pairwise(panels))
    assert "| layer | rank | uniform | weights pruned | of the sensitivity |" in get_note(study)
    shares = re.findall(r"([-\d.]+)% \|$", get_note(study), re.M)
    assert shares == ["10.0", "20.0", "-10.0", "30.0", "40.0", "10.0"]


@pytest.mark.parametrize("told", [[1, 2, 3, 4, 5], [0] * 6, [1, -1, 0, 0, 0, 0]])
def test_sensitivities_of_some_layers_only_or_without_a_sum_are_not_shown(told) -> None:
    study = with_space(3)
    study.set_user_attr(SENSITIVITY_ATTR, dict(zip(SPACE.distributions(), told, strict=False)))
    assert history(study).sensitivity is None


def test_a_drop_in_study_has_neither_uniform_nor_profile() -> None:
    study = drop_in(eight_ranks)
    publish_dashboard(study)
    shown = figures(study)
    assert traces(shown[RANKS_ID]).keys() == {"recommended"}
    assert "uniform" not in traces(shown[HISTORY_ID])
    assert "| layer | rank |\n" in get_note(study)
    assert "Sum of ranks" in get_note(study)


def test_several_objectives_get_the_heat_map_and_an_explanation() -> None:
    study = drop_in(lambda trial: (eight_ranks(trial), 1.0), directions=["maximize", "minimize"])
    publish_dashboard(study)
    assert figures(study).keys() == {HEAT_MAP_ID}
    assert "needs one objective" in get_note(study)


def test_two_rank_series_are_told_apart_by_name() -> None:
    study = drop_in(lambda t: sum(t.suggest_int(f"{m}_{i}_r", 1, 8) for i in range(3) for m in ("q", "v")))
    publish_dashboard(study)
    assert history(study).labels == ("q_0_r", "v_0_r", "q_1_r", "v_1_r", "q_2_r", "v_2_r")
    assert "LoraConfig" not in get_note(study)


def test_a_study_without_ranks_is_refused() -> None:
    study = drop_in(lambda trial: trial.suggest_float("lr", 0, 1))
    with pytest.raises(ValueError, match="no rank parameters"):
        publish_dashboard(study)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_history_follows_the_direction_and_skips_unfinished_trials(direction: str) -> None:
    def objective(trial: Trial) -> float:
        ranks = SPACE.suggest(trial)
        if trial.number == 2:
            raise optuna.TrialPruned
        if trial.number == 3:
            raise ZeroDivisionError
        return score(ranks)

    study = optuna.create_study(direction=direction, sampler=RankAdaptorSampler(SPACE, prior=None, seed=0))
    study.optimize(objective, n_trials=8, catch=ZeroDivisionError)
    h = history(study)
    assert h.numbers == (0, 1, 4, 5, 6, 7)
    assert (h.n_pruned, h.n_failed) == (1, 1)
    assert h.ranks.shape == (6, 6)
    assert h.labels == SPACE.layers
    assert h.is_uniform.tolist() == [True] + [False] * 5
    assert h.uniform_score == study.trials[0].value
    best = np.maximum if direction == "maximize" else np.minimum
    assert h.best.tolist() == best.accumulate(h.scores).tolist()
    assert h.best[-1] == study.best_value


def test_the_best_so_far_keeps_to_the_budget() -> None:
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(SPACE, prior=None, seed=0))
    study.enqueue_trial({SPACE.name(layer): 12 for layer in SPACE.layers})
    study.optimize(lambda trial: score(SPACE.suggest(trial)) + 100 * (trial.number == 0), n_trials=4)
    h = history(study)
    assert h.within_budget.tolist() == [False, True, True, True]
    assert h.best[-1] == max(h.scores[1:])
    publish_dashboard(study)
    assert "over the budget" in traces(figures(study)[HISTORY_ID])


def test_a_diverged_trial_does_not_squash_the_scale() -> None:
    study = with_space(8)
    study.add_trial(optuna.create_trial(params=study.trials[1].params, distributions=SPACE.distributions(), value=-1e6))
    publish_dashboard(study)
    figure = figures(study)[HISTORY_ID]
    assert "worse than shown" in traces(figure)
    from plotly.graph_objects import Figure

    shown = [y for trace in Figure(figure).to_dict()["data"] for y in decoded(trace["y"])]
    assert min(shown) > -10


def decoded(values: list | dict) -> list[float]:
    import base64

    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return values


def test_figures_stay_small_in_a_long_study() -> None:
    space = RankSpace(32, budget="uniform:8")
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize", sampler=RankAdaptorSampler(space, prior=None))
    for _ in range(600):
        ranks = dict(zip(space.distributions(), rng.choice(space.candidates, 32).tolist(), strict=True))
        value = float(rng.normal())
        study.add_trial(optuna.create_trial(params=ranks, distributions=space.distributions(), value=value))
    publish_dashboard(study)
    assert sum(len(json.dumps(figure)) for figure in figures(study).values()) < 50_000


def test_importing_it_loads_neither_plotly_nor_optuna_dashboard() -> None:
    code = "import sys, rankadaptor_optuna.views.dashboard; print({'plotly', 'optuna_dashboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("missing", ["plotly", "optuna_dashboard"])
def test_without_the_extra_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'rankadaptor-optuna\[dashboard\]'"):
        publish_dashboard(with_space(0))


@pytest.mark.parametrize("lost", ["db:mine@1", "custom:0123456789ab"])
def test_serve_shows_a_study_whose_prior_cannot_be_had(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = with_space(3, storage=url)
    study.set_user_attr("rankadaptor:prior", lost)
    with pytest.raises(ValueError, match="prior"):
        publish_dashboard(optuna.load_study(study_name=study.study_name, storage=url))
    assert get_note(study) == ""

    def interrupt(server: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rankadaptor_optuna.views.dashboard._Server.serve_forever", interrupt)
    serve(url, port=0)
    assert "Recommended ranks" in get_note(study)
    assert study.user_attrs["rankadaptor:prior"] == lost


def test_serve_says_when_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on port {port} .* choose another port"):
            serve(f"sqlite:///{tmp_path / 'study.db'}", port=port)


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/folder/study.db", "no url", "postgresql://me:secret@127.0.0.1:1/study"]
)
def test_serve_says_when_the_storage_cannot_be_opened_and_keeps_the_password(url: str) -> None:
    with pytest.raises(ValueError, match="cannot open the storage") as error:
        serve(url, port=0)
    assert "secret" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1
