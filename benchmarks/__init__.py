"""Measurements behind the project's figures: ``python -m benchmarks.NAME [--quick]``; see README.md."""
