"""`python -m pipelines.export RECIPE`: the same as `raykd export RECIPE`, for `ray job submit`."""

from raykd.cli import main

if __name__ == "__main__":
    main("export")
