"""Real servers for the end-to-end tests."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy


def missing(what: str) -> NoReturn:
    """Skips where a user has not installed a server; in CI everything must run."""
    message = f"{what} is not installed on this machine"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def folder_of(user: str) -> tuple[Path, list[str]]:
    """Makes a server's folder; returns it, and the command prefix that runs as ``user``: servers refuse root."""
    folder = Path(tempfile.mkdtemp(prefix=f"{user}-"))
    if os.geteuid() != 0:
        return folder, []
    os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    return folder, ["runuser", "-u", user, "--"]


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a real browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing("Chromium")
    return path


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[tuple[str, Callable[..., None]]]:
    """URL of a fresh PostgreSQL server on a free port, and a function that calls its ``pg_ctl``: ``("restart",)``."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        missing("PostgreSQL")
    (folder, as_user), port = folder_of("postgres"), free_port()
    data, bin_dir = folder / "data", Path(initdb).parent

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL)

    def control(*command: str) -> None:
        run(str(bin_dir / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, *command)

    run(initdb, "--no-sync", "-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    control("start")
    yield f"postgresql+psycopg://tester:secret@127.0.0.1:{port}", control
    control("stop", "-m", "immediate")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres(postgres_server: tuple[str, Callable[..., None]]) -> str:
    """URL of a fresh PostgreSQL server on a free port; each test makes its own database in it."""
    return postgres_server[0]


@pytest.fixture(scope="session")
def mariadb() -> Iterator[str]:
    """URL of a fresh MariaDB server on a free port; each test makes its own database in it."""
    server, install = (
        shutil.which("mariadbd", path="/usr/sbin:/usr/bin:/usr/local/sbin"),
        shutil.which("mariadb-install-db"),
    )
    if server is None or install is None or importlib.util.find_spec("pymysql") is None:
        missing("MariaDB with pymysql")
    (folder, as_user), port = folder_of("mysql"), free_port()
    data, first = folder / "data", folder / "first.sql"
    first.write_text("CREATE USER tester IDENTIFIED BY 'secret';\nGRANT ALL ON *.* TO tester;\n")
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*as_user, install, "--no-defaults", f"--datadir={data}", "--skip-test-db"], check=True, **quiet)
    options = [f"--datadir={data}", f"--socket={folder / 'socket'}", f"--port={port}", "--bind-address=127.0.0.1"]
    options += [f"--init-file={first}", "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0"]
    process = subprocess.Popen([*as_user, server, "--no-defaults", *options], **quiet)
    url = f"mysql+pymysql://tester:secret@127.0.0.1:{port}"
    try:
        engine = sqlalchemy.create_engine(f"{url}/mysql", poolclass=sqlalchemy.NullPool)
        for _ in range(300):
            try:
                engine.connect().close()
                break
            except sqlalchemy.exc.OperationalError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        engine = sqlalchemy.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    else:
        server = request.getfixturevalue("mariadb")
        engine = sqlalchemy.create_engine(f"{server}/mysql", isolation_level="AUTOCOMMIT")
    name = f"test_{abs(hash(tmp_path.name)) % 10**8}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"


@pytest.fixture(scope="session")
def at_once() -> Callable[..., list[str]]:
    """Starts n processes, lets them pass ``sys.stdin.readline()`` at the same moment, and returns what they print."""

    def run(code: str, arguments: list[str], n: int) -> list[str]:
        command = [sys.executable, "-c", code, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, **pipes) for _ in range(n)]
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = []
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            printed.append(out)
        return printed

    return run
