"""The performance model: what a rank configuration will score, learned from finished trials."""
