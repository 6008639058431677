"""The command ``python -m benchmarks.pretrain_prior``."""

from benchmarks.prior.pretrain import main

if __name__ == "__main__":
    main()
