"""Studies: create and resume, read, verify, recommend, converge."""
