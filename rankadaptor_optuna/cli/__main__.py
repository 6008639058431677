"""Runs the command as ``python -m rankadaptor_optuna.cli``, for launchers of several processes."""

from rankadaptor_optuna.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
