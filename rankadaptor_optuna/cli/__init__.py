"""The ``rankadaptor`` command."""

from rankadaptor_optuna.cli.app import main

__all__ = ["main"]
