"""The command ``python -m benchmarks.collect_tasks``."""

from benchmarks.tasks.collect import main

if __name__ == "__main__":
    main()
