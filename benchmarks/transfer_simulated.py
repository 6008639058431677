"""The command ``python -m benchmarks.transfer_simulated``."""

from benchmarks.race.transfer_simulated import main

if __name__ == "__main__":
    main()
