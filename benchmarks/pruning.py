"""The command ``python -m benchmarks.pruning``."""

from benchmarks.speed.pruning import main

if __name__ == "__main__":
    main()
