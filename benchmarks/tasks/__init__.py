"""Tasks to measure on: recoveries of small and real models, functions that stand in for them, and kept losses."""
