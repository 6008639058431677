"""The command ``python -m benchmarks.families``."""

from benchmarks.families.matrix import main

if __name__ == "__main__":
    main()
