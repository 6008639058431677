"""The command ``python -m benchmarks.recovery_tasks``."""

from benchmarks.tasks.recovery import main

if __name__ == "__main__":
    main()
