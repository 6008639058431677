"""Optuna contracts: search spaces and trials as arrays, and the sampler."""
