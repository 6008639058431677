"""The command ``python -m benchmarks.paper_ablations``."""

from benchmarks.paper.ablations import main

if __name__ == "__main__":
    main()
