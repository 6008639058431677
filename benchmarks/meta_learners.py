"""The command ``python -m benchmarks.meta_learners``."""

from benchmarks.prior.meta_learners import main

if __name__ == "__main__":
    main()
