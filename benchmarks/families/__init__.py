"""Pruning, recovery and export of many model families."""
