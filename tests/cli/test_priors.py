from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
import sqlalchemy

from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.priors.store import PriorStore
from rankadaptor_optuna.surrogate.prior import load_prior

CARD = {
    "made": "2030-01-02T03:04:05+00:00",
    "version": "0.1.0",
    "tasks": [{"name": "a", "layers": 6, "trials": 20}, {"name": "b", "layers": 8, "trials": 24}],
    "held_out": {
        "n_first": 8,
        "with_prior": 0.6,
        "without": 0.4,
        "gain": 0.2,
        "tasks": [{"name": "b", "with_prior": 0.6, "without": 0.4, "gain": 0.2}],
    },
}


@pytest.fixture
def url(tmp_path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    for _ in range(3):
        PriorStore(url).add("mine", replace(load_prior("pretrained"), card=CARD))
    space = RankSpace(4, (2, 4, 8), "uniform:4")
    study = optuna.create_study(
        storage=url, study_name="user", sampler=RankAdaptorSampler(space, prior="db:mine@1", seed=0)
    )
    study.optimize(lambda trial: float(sum(space.suggest(trial).values())), n_trials=1)
    return url


def said(capsys, *arguments):
    assert main(["priors", *arguments]) == 0
    return capsys.readouterr().out


def test_priors_are_listed_with_what_they_are_worth_and_who_uses_them(url, capsys):
    head, _, *rows = said(capsys, "list", "--storage", url).splitlines()
    assert head.split() == ["prior", "made", "(UTC)", "bytes", "tasks", "gain", "used", "by"]
    assert [row.split()[0] for row in rows] == ["db:mine@1", "db:mine@2", "db:mine@3"]
    assert [row.split()[-3:] for row in rows] == [["2", "+0.20", "user"], ["2", "+0.20", "-"], ["2", "+0.20", "-"]]


def test_a_corrupt_prior_is_listed_as_such(url, capsys):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE rankadaptor_priors SET weights = x'00' WHERE version = 2"))
    engine.dispose()
    assert [row.split()[4] for row in said(capsys, "list", "--storage", url).splitlines()[2:]] == [
        "2",
        "unreadable",
        "2",
    ]
    assert main(["priors", "show", "db:mine@2", "--storage", url]) == 2
    assert "prior db:mine@2 in sqlite" in capsys.readouterr().err


HOSTILE = [
    {"tasks": 5, "held_out": 7},
    {"tasks": [1], "held_out": {"gain": "much"}},
    {**CARD, "held_out": {"gain": 0.5}},
    {**CARD, "tasks": [{"name": "a", "layers": "many", "trials": None}]},
    {"tasks": {"a": 1}, "held_out": None, "note": "\x1b]0;owned\x07\u202e\nprior"},
]


def test_cards_of_others_are_listed_and_shown_without_control_characters(url, capsys):
    for card in HOSTILE:
        PriorStore(url).add("odd", replace(load_prior("pretrained"), card=card))
    rows = said(capsys, "list", "--storage", url).splitlines()[2:]
    assert [row.split()[-2] for row in rows if row.startswith("db:odd")] == ["-"] * len(HOSTILE)
    for version in range(1, len(HOSTILE) + 1):
        shown = said(capsys, "show", f"db:odd@{version}", "--storage", url)
        assert shown.replace("\n", "").isprintable()
    assert "note: \\x1b]0;owned\\x07\\u202e prior\n" in shown


@pytest.mark.parametrize(
    "change", ["weights = 'text'", "weights = x''", "made = 'soon'", "checksum = x'00'", "version = -1"]
)
def test_rows_that_no_worker_wrote_spoil_no_other(url, change, capsys):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"UPDATE rankadaptor_priors SET {change} WHERE version = 2"))
    engine.dispose()
    rows = said(capsys, "list", "--storage", url).splitlines()[2:]
    assert [row.split()[4] for row in rows if "@2" not in row] == ["2", "2"]
    assert main(["priors", "show", "db:mine@2", "--storage", url]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_priors_card_is_shown(url, capsys):
    assert said(capsys, "show", "db:mine", "--storage", url) == (
        "Made 2030-01-02T03:04:05+00:00 by version 0.1.0 from 2 tasks, 44 trials, 6 to 8 layers.\n"
        "Rank correlation on held-out tasks (1), predicted from their first 8 trials: 0.60 with the prior, 0.40 "
        "without; gain +0.20.\n"
        "\n"
        "task  layers  trials  gain, held out\n"
        "------------------------------------\n"
        "a          6      20               -\n"
        "b          8      24           +0.20\n"
    )
    assert "from 49 tasks" in said(capsys, "show") == said(capsys, "show", "pretrained")


def test_a_prior_without_a_card_says_so(tmp_path, capsys):
    file = tmp_path / "mine.safetensors"
    replace(load_prior("pretrained"), card={}).save(file)
    assert said(capsys, "show", str(file)) == "no card\n"


def test_pruning_says_what_it_removed_and_spares_what_is_used(url, capsys):
    assert said(capsys, "prune", "--storage", url) == "Removed nothing.\n"
    assert said(capsys, "prune", "db:other", "--keep", "1", "--storage", url) == "Removed nothing.\n"
    assert said(capsys, "prune", "db:mine", "--keep", "1", "--storage", url) == "Removed db:mine@2.\n"


def test_collecting_removes_what_deleted_studies_leave(url, capsys):
    assert said(capsys, "gc", "--storage", url) == "Forgot the uses of 0 deleted studies. Removed nothing.\n"
    optuna.delete_study(study_name="user", storage=url)
    assert said(capsys, "gc", "--storage", url) == "Forgot the uses of 1 deleted studies: user. Removed db:mine@1.\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list"], "Missing option '--storage'"),
        (["show", "db:mine"], "name the database that holds the prior db:mine"),
        (["prune", "--keep", "0", "--storage", "URL"], "keep must be at least 1"),
        (["list", "--storage", "sqlite:///typo.db"], "there is no file typo.db"),
        (["show", "db:mine", "--storage", "sqlite:///typo.db"], "there is no file typo.db"),
        (["prune", "--storage", "sqlite:///typo.db"], "there is no file typo.db"),
        (["gc", "--storage", "sqlite:///typo.db"], "there is no file typo.db"),
        (["prune", "mine", "--storage", "URL"], "expected a prior like db:NAME"),
        (["show", "db:other", "--storage", "URL"], "there is no prior db:other"),
        (["show", "mine", "--storage", "URL"], "there is no such file; one of a database is named db:NAME"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(url, capsys, arguments, says):
    assert main(["priors", *(url if word == "URL" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
