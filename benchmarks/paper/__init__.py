"""The table and the ablations of the RankAdaptor paper."""
