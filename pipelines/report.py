"""`python -m pipelines.report RECIPE`: the same as `raykd report RECIPE`, for `ray job submit`."""

from raykd.cli import main

if __name__ == "__main__":
    main("report")
