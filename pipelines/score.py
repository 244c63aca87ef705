"""`python -m pipelines.score RECIPE`: the same as `raykd score RECIPE`, for `ray job submit`."""

from raykd.cli import main

if __name__ == "__main__":
    main("score")
