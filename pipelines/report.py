"""`python -m pipelines.report RECIPE`, or RUN RUN: the same as `raykd report`, for `ray job
submit`.
"""

from raykd.cli import main

if __name__ == "__main__":
    main("report")
