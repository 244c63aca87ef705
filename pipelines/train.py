"""`python -m pipelines.train RECIPE`: the same as `raykd train RECIPE`, for `ray job submit`."""

from raykd.cli import main

if __name__ == "__main__":
    main("train")
