"""The shipped prior and other ways to meta-learn."""
