"""Data: a recipe's `[data]` table as checked rows in their splits."""

from raykd.data.rows import SPLITS, Dataset, Rows
from raykd.data.sources import load

__all__ = ["SPLITS", "Dataset", "Rows", "load"]
