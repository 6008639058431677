"""The command ``python -m benchmarks.paper_table``."""

from benchmarks.paper.table import main

if __name__ == "__main__":
    main()
