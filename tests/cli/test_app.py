from __future__ import annotations

import io
import subprocess
import sys
import warnings

import optuna
import pytest

from rankadaptor_optuna import __version__
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.priors.store import PriorStore
from rankadaptor_optuna.surrogate.prior import load_prior

OPENING = "rankadaptor dashboard: error: cannot open the storage"
COMMANDS = [
    "quickstart",
    "search",
    "export",
    "compare",
    "prune",
    "import-checkpoint",
    "meta-train",
    "priors",
    "dashboard",
]


@pytest.mark.parametrize("arguments", [[], ["priors"]])
def test_without_a_command_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == 2
    listed = capsys.readouterr().err.partition("Commands:")[2].splitlines()
    names = [line.split()[0] for line in listed if line.startswith("  ")]
    assert sorted(names) == sorted(["list", "show", "prune", "gc"] if arguments else COMMANDS)
    assert not any(line.endswith("...") for line in listed)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["serch"], "rankadaptor: error: No such command 'serch'. Did you mean 'search'?"),
        (["priors", "lst"], "rankadaptor priors: error: No such command 'lst'. Did you mean 'list'?"),
        (
            ["export", "--sed", "3"],
            "rankadaptor export: error: No such option: --sed (Possible options: --seed",
        ),
        (["search", "--trials", "many"], "rankadaptor search: error: Invalid value for '--trials': "),
        (["search", "--trials"], "rankadaptor search: error: Option '--trials' requires an argument"),
        (["export", "--storage", "x"], "rankadaptor export: error: Missing argument 'OUT'"),
        (["dashboard"], "rankadaptor dashboard: error: Missing option '--storage'"),
        (
            ["dashboard", "--storage", "s.db"],
            f"{OPENING} (not a database URL): give a URL such as sqlite:///study.db or ",
        ),
        (
            ["dashboard", "--storage", "postgres://h/d"],
            f"{OPENING} postgres://h/d: SQLAlchemy knows no database 'postgres'",
        ),
        (["import-checkpoint", "no.bin", "out"], "rankadaptor import-checkpoint: error: there is no file no.bin"),
        (["dashboard", "--storage", "no url"], "rankadaptor dashboard: error: cannot open the storage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(arguments, error, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(error)
    assert (err.count("\n"), out) == (1, "")


@pytest.mark.parametrize("command", [["compare"], ["export", "out"], ["dashboard"], ["meta-train"], ["search"]])
def test_a_mistyped_sqlite_path_makes_no_file(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--storage", "sqlite:///typo.db"]) == 2
    assert "there is no file typo.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_a_description(command, capsys):
    assert main([command, "--help"]) == 0
    options = capsys.readouterr().out.partition("Options:\n")[2].partition("\n\n")[0]
    assert "--help  " in options
    described = options.replace("\n" + " " * 20, " ")  # the second column, where it starts on a new line
    assert all(len(line.split("  ")) > 2 for line in described.splitlines() if line.startswith("  --"))


def test_the_version_is_shown(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_interrupt_says_how_to_continue(monkeypatch, capsys):
    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankadaptor_optuna.views.server.serve", interrupt)
    assert main(["dashboard", "--storage", "sqlite://"]) == 130
    assert capsys.readouterr().err == "\nInterrupted. Run the same command again to continue.\n"


def test_help_loads_neither_torch_nor_optuna():
    code = "import sys; from rankadaptor_optuna.cli import main; main(['prune', '--help'])\n"
    code += "assert not {'torch', 'optuna', 'transformers'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--keep-first" in shown


def test_the_command_completes_in_a_shell():
    settings = {"_RANKADAPTOR_COMPLETE": "complete_bash", "COMP_WORDS": "rankadaptor sea", "COMP_CWORD": "1"}
    code = f"import os; os.environ.update({settings}); from rankadaptor_optuna.cli import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["search"]


def test_without_typer_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["search"]) == 2
    assert capsys.readouterr().err == (
        "rankadaptor: error: typer is not installed; it belongs to the extra 'cli': in the package's folder, "
        "pip install -e '.[cli]'\n"
    )


@pytest.mark.parametrize(
    ("library", "extra", "command"),
    [
        ("transformers", "llm", ["prune", "embedded", "out"]),
        ("peft", "llm", ["search", "--storage", "sqlite:///s.db"]),
        ("pydantic", "llm", ["export", "out", "--storage", "sqlite:///s.db"]),
        ("matplotlib", "demo", ["compare", "--storage", "sqlite:///s.db"]),
        ("plotly", "dashboard", ["quickstart"]),
        ("optuna_dashboard", "dashboard", ["dashboard", "--storage", "sqlite:///s.db"]),
        ("pymysql", "mysql", ["priors", "list", "--storage", "mysql+pymysql://host/db"]),
        ("psycopg", "postgres", ["meta-train", "--storage", "postgresql+psycopg://host/db"]),
    ],
)
def test_a_missing_library_is_named_with_its_extra_before_any_work(
    library, extra, command, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{library} is not installed; it belongs to the extra '{extra}'" in error
    assert f"pip install -e '.[{extra}]'" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_priors_of_a_database_need_no_model_library(monkeypatch, tmp_path, capsys):
    optuna.create_study(storage=f"sqlite:///{tmp_path / 's.db'}")
    for library in ("transformers", "peft", "lm_eval", "accelerate", "datasets", "plotly", "matplotlib"):
        monkeypatch.setitem(sys.modules, library, None)
    assert main(["priors", "list", "--storage", f"sqlite:///{tmp_path / 's.db'}"]) == 0


def test_a_warning_is_one_line(monkeypatch, capsys):
    from rankadaptor_optuna.jobs import prune as job

    def warn(*_, **__):
        warnings.warn("no adapters in:\n experts", stacklevel=1)
        raise ValueError("that was all.")

    monkeypatch.setattr(job, "prune_checkpoint", warn)
    before = warnings.showwarning
    assert main(["prune", "somewhere", "nowhere"]) == 2
    assert "rankadaptor: warning: no adapters in: experts\n" in capsys.readouterr().err
    assert warnings.showwarning is before


def test_a_name_that_the_terminal_cannot_show_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "s.db").touch()
    store = PriorStore(f"sqlite:///{tmp_path / 's.db'}")
    store.use("😀", store.add("mine", load_prior("pretrained")), elsewhere=True)
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert main(["priors", "list", "--storage", store.url]) == 0
    assert rb"\U0001f600" in shown.getvalue()
