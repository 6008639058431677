from __future__ import annotations

import errno
import tempfile
import threading
from pathlib import Path

import pytest

from rankadaptor_optuna.checks.folders import check_writable
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs.output import only_process


def test_a_folder_to_create_is_writable_and_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    check_writable(Path("relative/folder"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "says"), [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left")])
def test_a_read_only_or_full_disk_is_refused(tmp_path, monkeypatch, number, says):
    class Full:
        def __init__(self, dir):
            assert dir == tmp_path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(number, f"{says} on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(ValueError, match=rf"cannot write to {tmp_path}/new: {says}.*; choose another folder"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize(
    "command",
    [
        ["search", "recipe.toml", "--out"],
        ["quickstart", "--model", "nowhere", "--out"],
        ["prune", "nowhere"],
        ["export", "--storage", "sqlite:///s.db"],
        ["import-checkpoint", "file.bin", "--allow-pickle"],
    ],
)
def test_a_file_in_place_of_a_folder_is_refused_before_any_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "file.bin").write_text("")
    (tmp_path / "file").write_text("mine")
    assert main([*command, "file/out"]) == 2
    assert f"cannot write to file/out: {tmp_path / 'file'} is a file; choose another folder." in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_process_in_a_folder_waits_and_says_so(tmp_path):
    waits, done = threading.Event(), []

    def say(line):
        done.append(line)
        waits.set()

    def second():
        with only_process(tmp_path / "out", say):
            done.append("second")

    thread = threading.Thread(target=second)
    with only_process(tmp_path / "out", done.append):
        thread.start()
        assert waits.wait(60)
        done.append("first")
    thread.join()
    assert done == [f"Waiting for another process that works in {tmp_path / 'out'}", "first", "second"]
