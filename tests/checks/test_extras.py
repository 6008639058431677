from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankadaptor_optuna.checks.extras import EXTRAS, import_hint, require

tomllib = pytest.importorskip("tomllib")  # Python 3.11


def test_every_library_of_an_extra_for_users_is_known():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, requirements in project["optional-dependencies"].items():
        names = [re.match(r"[\w-]+", each)[0].replace("-", "_") for each in requirements]
        own = [name for name in names if name != "rankadaptor_optuna"]
        assert extra == "test" or [name for name in own if EXTRAS.get(name) != extra] == []


def test_a_library_of_no_extra_is_named_as_python_does():
    with pytest.raises(ModuleNotFoundError, match="No module named 'nolibrary'") as caught:
        require("json", "nolibrary")
    assert import_hint(caught.value) == "No module named 'nolibrary'"
