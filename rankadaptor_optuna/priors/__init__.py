"""Learned starts of the performance model: meta-learning, a store of versions in a database, the prior of a study."""
