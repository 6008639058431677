"""The command ``python -m benchmarks.calibration``."""

from benchmarks.race.calibration import main

if __name__ == "__main__":
    main()
