"""Races between samplers: from scratch, with a prior, and how well predictions are calibrated."""
