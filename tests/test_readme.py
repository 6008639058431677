"""Runs what the documents tell a reader to run: Python blocks as pasted, commands in the document's order."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from rankadaptor_optuna.cli import app, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern))
README = ROOT / "README.md"
NEEDS_MODEL = re.compile(r"load_model|from_pretrained|rankadaptor-out")
# options appended by the end-to-end test; the last value of an option counts
SMALL = {"quickstart": "--trials 2", "search": "--trials 2", "compare": "--seeds 2", "dashboard": "--port 0"}


def examples(path, *parsers):
    return list(Sybil(parsers=parsers, path=str(path.parent)).parse(path))


def commands(block):
    """Arguments of each ``rankadaptor`` command in a block of shell lines."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|;", line)]
    return [rest for first, *rest in filter(None, words) if first == "rankadaptor"]


def name_of(example):
    return f"{Path(example.path).name}:{example.line}"


SHELL_BLOCKS = [e for path in DOCUMENTS for e in examples(path, CodeBlockParser("bash", lambda example: None))]
PYTHON_BLOCKS = [e for path in DOCUMENTS for e in examples(path, PythonCodeBlockParser())]


@pytest.mark.parametrize(
    "arguments", [pytest.param(c, id=f"{name_of(e)} {' '.join(c)}") for e in SHELL_BLOCKS for c in commands(e.parsed)]
)
def test_commands_and_their_options_exist(arguments, monkeypatch):
    monkeypatch.setattr(app, "_prepared", lambda command, *_: functools.wraps(command)(lambda **options: None))
    assert main(arguments) == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_modules_and_named_code_exist(path):
    text = path.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []
    modules = re.findall(r"python -m ((?:benchmarks|rankadaptor_optuna)(?:\.[a-z_0-9]+)+)", text)
    assert [module for module in modules if not is_runnable(module)] == []
    sources = {name: source_of(name) for name in re.findall(r"`([\w/.-]+\.py)`", text)}
    assert [name for name, source in sources.items() if source is None] == []
    located = re.findall(r"`([\w.]+)`(?: in | \()`([\w/.-]+\.py)`", text)  # `name` in `file`, `name` (`file`)
    assert [(name, file) for name, file in located if name.rpartition(".")[2] not in sources[file]] == []


def is_runnable(module):
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.util.find_spec(f"{module}.__main__") is not None if is_package else spec is not None


def source_of(name):
    """Text of a file named from the root or from the package; None if there is none."""
    found = [folder / name for folder in (ROOT, ROOT / "rankadaptor_optuna") if (folder / name).is_file()]
    return found[0].read_text() if found else None


@pytest.mark.parametrize(
    "example", [pytest.param(e, id=name_of(e)) for e in PYTHON_BLOCKS if not NEEDS_MODEL.search(e.parsed)]
)
def test_python_blocks_run_as_pasted(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example.document.namespace.clear()
    example.evaluate()


@pytest.mark.e2e
def test_the_readme_runs_in_its_order_in_one_folder(make_model, tokenizer, tmp_path):
    """All but the blocks marked as skipped, which need a server; a tiny model stands in for the embedded one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    sizes = {"intermediate_size": 128, "num_hidden_layers": 6, "max_position_embeddings": 512}
    embedded = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    make_model(**sizes).save_pretrained(embedded)
    tokenizer.save_pretrained(embedded)
    settings = {"cwd": tmp_path, "env": {**os.environ, "RANKADAPTOR_CACHE": str(tmp_path / "cache")}, "text": True}

    def run(*command):
        done = subprocess.run(command, capture_output=True, timeout=900, check=False, **settings)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"

    def serve(*command):
        """Runs a server until it prints its address."""
        with subprocess.Popen(command, stdout=subprocess.PIPE, **settings) as process:
            said = process.stdout.readline()
            process.terminate()
        assert "http://" in said

    def shell(example):
        for name, *rest in commands(example.parsed):
            command = [sys.executable, "-m", "rankadaptor_optuna.cli", name, *rest, *SMALL.get(name, "").split()]
            (serve if name == "dashboard" else run)(*command)

    def python(example):
        run(sys.executable, "-c", example.parsed)

    parsers = CodeBlockParser("bash", shell), CodeBlockParser("python", python), SkipParser()
    for example in examples(README, *parsers):
        try:
            example.evaluate()
        except unittest.SkipTest:
            continue
