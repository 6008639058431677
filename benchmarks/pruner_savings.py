"""The command ``python -m benchmarks.pruner_savings``."""

from benchmarks.speed.pruner_savings import main

if __name__ == "__main__":
    main()
