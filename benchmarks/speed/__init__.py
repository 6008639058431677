"""Costs: of a proposal, of a trial, of pruned trials, and of pruning a model."""
