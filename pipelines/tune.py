"""`python -m pipelines.tune RECIPE`: the same as `raykd tune RECIPE`, for `ray job submit`."""

from raykd.cli import main

if __name__ == "__main__":
    main("tune")
