"""The command ``python -m benchmarks.trial_throughput``."""

from benchmarks.speed.trial_throughput import main

if __name__ == "__main__":
    main()
