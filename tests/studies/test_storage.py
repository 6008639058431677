from __future__ import annotations

import sqlite3

import optuna
import pytest
from optuna.samplers import RandomSampler

from rankadaptor_optuna import RankSpace, create_study
from rankadaptor_optuna.database.attributes import RECIPE_ATTR
from rankadaptor_optuna.studies.storage import check_same_settings, open_storage

SPACE = RankSpace(
    10, budget="uniform:8", layers=range(1, 9), costs=[100] * 4 + [120] * 4, fixed_ranks={0: 8, 9: 8}, fixed_cost=1600
)
RECIPE = {"model": "tiny", "pruning": {"ratio": 0.25}, "candidates": [2, 4, 8]}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_a_study_is_resumed_by_its_name_with_its_trials(url):
    settings = {"storage": url, "study_name": "s", "space": SPACE, "recipe": RECIPE, "direction": "minimize"}
    create_study(**settings).optimize(lambda trial: -sum(SPACE.suggest(trial).values()), n_trials=2)
    resumed = create_study(**settings)
    assert len(resumed.trials) == 2
    assert resumed.user_attrs[RECIPE_ATTR] == RECIPE
    assert resumed.sampler.space == SPACE
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        create_study(**settings, load_if_exists=False)


def test_by_default_a_study_is_in_memory_and_maximised():
    study = create_study(space=SPACE)
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.sampler.space == SPACE
    assert create_study(sampler=(own := RandomSampler())).sampler is own


def test_another_recipe_is_refused_and_the_differences_named(url):
    create_study(storage=url, study_name="s", recipe=RECIPE)
    other = {**RECIPE, "model": "big", "pruning": {"ratio": 0.5}, "seed": 1}
    with pytest.raises(ValueError, match="study 's' belongs to other settings") as caught:
        create_study(storage=url, study_name="s", recipe=other)
    message = str(caught.value)
    assert "model was tiny, now big" in message
    assert "pruning.ratio was 0.25, now 0.5" in message
    assert "seed was None, now 1" in message
    assert "candidates" not in message
    assert "another study name" in message
    assert optuna.load_study(study_name="s", storage=url).user_attrs[RECIPE_ATTR] == RECIPE


@pytest.mark.parametrize(
    ("was", "now", "shown"),
    [
        ("a" * 60, "b" * 60, (f"was {'a' * 60}, ", f"now {'b' * 60}.")),
        (
            "/models/" + "x" * 90 + "-one",
            "/models/" + "x" * 90 + "-two",
            (f"was ...{'x' * 19}-one, ", f"now ...{'x' * 19}-two."),
        ),
        ("x" * 90, "x" * 90 + "y" * 90, (f"was ...{'x' * 20}, ", f"now ...{'x' * 20}{'y' * 40}....")),
    ],
)
def test_long_settings_are_shown_where_they_differ(was, now, shown):
    with pytest.raises(ValueError, match="model was") as caught:
        check_same_settings("out", {"model": was}, {"model": now}, "another")
    assert all(part in str(caught.value) for part in shown)


def test_at_most_five_differences_are_named():
    keys = [f"k{i}" for i in range(7)]
    with pytest.raises(ValueError, match=r"out belongs to other settings: a\.k0 was 0, now 1; ") as caught:
        check_same_settings("out", {"a": dict.fromkeys(keys, 0)}, {"a": dict.fromkeys(keys, 1)}, "another")
    assert "; a.k4 was 0, now 1; and 2 more. Use those, or another." in str(caught.value)
    assert "k5" not in str(caught.value)


def test_a_missing_database_file_is_refused_where_a_study_must_exist(tmp_path):
    for path in (tmp_path / "typo.db", tmp_path / "no" / "folder.db"):
        with pytest.raises(ValueError, match=f"cannot open the storage .*: there is no file {path}"):
            open_storage(f"sqlite:///{path}", create=False)
    assert list(tmp_path.iterdir()) == []
    for url in (f"sqlite:///file:{tmp_path}/typo.db?uri=true", f"sqlite:///{tmp_path}", "sqlite://"):
        with pytest.raises(ValueError, match="cannot open the storage"):
            open_storage(url, create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_database_of_something_else_gets_no_tables_where_a_study_must_exist(tmp_path):
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE cats (name TEXT)")
        other.execute("CREATE TABLE studies (patient TEXT)")  # not Optuna's
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(ValueError, match="it has no studies"):
        open_storage(f"sqlite:///{tmp_path / 'other.db'}", create=False)
    assert (tmp_path / "other.db").read_bytes() == before
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(ValueError, match="file is not a database"):
        open_storage(f"sqlite:///{tmp_path / 'text.db'}", create=False)


def test_a_recipe_is_the_same_again_after_json_made_lists_of_its_tuples(url):
    recipe = {"candidates": (2, 4, 8)}
    create_study(storage=url, study_name="s", recipe=recipe)
    assert create_study(storage=url, study_name="s", recipe=recipe).study_name == "s"


def test_a_setting_that_an_older_recipe_lacks_is_its_default(url):
    create_study(storage=url, study_name="s", recipe={"pruning": {"ratio": 0.25, "steps": None}})
    assert create_study(storage=url, study_name="s", recipe={"pruning": {"ratio": 0.25, "reduction": None}}).user_attrs


def test_a_database_of_an_url_gets_a_heartbeat_that_retries(url):
    storage = open_storage(url)
    assert storage.heartbeat_interval > 0
    assert create_study(storage=storage)._storage._backend is storage


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////no/such/folder/study.db",
        "postgresql+psycopg://me:s3cret@127.0.0.1:1/studies",
        "postgresql+nodriver://me:s3cret@127.0.0.1/studies",
        "nodatabase://me:s3cret@127.0.0.1/studies",
        "oracle://me:s3cret@127.0.0.1/studies",
        "postgresql://me:s3cret@127.0.0.1:port/studies",
        "postgresql+psycopg://me:pass@s3cret@127.0.0.1:1/studies",
        "postgresql+psycopg://me:p/s3cret@127.0.0.1:1/studies",
        "postgresql+psycopg://me:p@x?s3cret@127.0.0.1:1/studies",
        "postgresql+psycopg://127.0.0.1:1/studies?user=me&password=s3cret",
        "mysql+pymysql://127.0.0.1:1/studies?user=me&passwd=s3cret",
        "study.db",
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(url):
    with pytest.raises(ValueError, match="cannot open the storage ") as caught:
        create_study(storage=url)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["n" * 513, "a\0b", "", "  ", "\ud800"])
def test_a_name_that_some_database_cannot_hold_is_refused(url, name):
    with pytest.raises(ValueError, match="a study name has 1 to 512 characters"):
        create_study(storage=url, study_name=name)
    assert create_study(storage=url, study_name="n" * 512).study_name == "n" * 512


def test_a_locked_database_is_waited_for_in_words_and_not_for_ten_times_a_minute(url, tmp_path, monkeypatch, caplog):
    open_storage(url).remove_session()
    monkeypatch.setattr("rankadaptor_optuna.studies.patient_storage._LOCKED_S", 0)
    monkeypatch.setattr("rankadaptor_optuna.database.connections._LONGEST_S", 0)
    monkeypatch.setattr("rankadaptor_optuna.database.connections.time.sleep", pytest.fail)
    optuna.logging.enable_propagation()
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match=r"cannot open the storage .*: database is locked"):
            open_storage(f"{url}?timeout=0")
    optuna.logging.disable_propagation()
    assert f"Waiting for the database {url}?timeout=0: database is locked" in caplog.text
