"""Learned starts of the performance model: meta-learning, versions in a database, the prior of a study."""
