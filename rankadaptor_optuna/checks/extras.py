"""The extra of this package to which an optional library belongs, and how to install it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# by the name under which a library is imported; pyproject.toml has the versions
EXTRAS = {
    "typer": "cli",
    "transformers": "llm",
    "peft": "llm",
    "lm_eval": "llm",
    "accelerate": "llm",
    "pydantic": "llm",
    "filelock": "llm",
    "tomli": "llm",
    "datasets": "llm",  # of lm_eval
    "optuna_dashboard": "dashboard",
    "plotly": "dashboard",
    "psycopg": "postgres",
    "pymysql": "mysql",
    "gguf": "demo",
    "matplotlib": "demo",
}


def require(*libraries: str) -> None:
    """Checks that libraries are installed, without importing them.

    Raises:
        ModuleNotFoundError: One is missing; the message names its extra and how to install it.
    """
    for name in libraries:
        if (sys.modules[name] is None) if name in sys.modules else find_spec(name) is None:
            error = ModuleNotFoundError(f"No module named {name!r}", name=name)
            raise ModuleNotFoundError(import_hint(error), name=name)


def import_hint(error: ImportError) -> str:
    """Returns the message of an import error; for a library of an extra, how to install it.

    The command works in a checkout of the package, as the README has it.
    """
    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in EXTRAS:
        return str(error)
    extra = EXTRAS[name]
    return (
        f"{name} is not installed; it belongs to the extra {extra!r}: in the package's folder, "
        f"pip install -e '.[{extra}]'"
    )
