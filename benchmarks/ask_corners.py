"""The command ``python -m benchmarks.ask_corners``."""

from benchmarks.speed.ask_corners import main

if __name__ == "__main__":
    main()
