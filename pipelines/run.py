"""`python -m pipelines.run RECIPE`: the same as `raykd run RECIPE`, for `ray job submit`."""

from raykd.cli import main

if __name__ == "__main__":
    main("run")
