"""The command ``python -m benchmarks.transfer``."""

from benchmarks.race.transfer import main

if __name__ == "__main__":
    main()
