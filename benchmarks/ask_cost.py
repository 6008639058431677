"""The command ``python -m benchmarks.ask_cost``."""

from benchmarks.speed.ask_cost import main

if __name__ == "__main__":
    main()
