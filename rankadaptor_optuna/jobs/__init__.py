"""What a command runs: each job takes settings and returns a result."""
