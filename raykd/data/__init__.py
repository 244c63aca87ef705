"""Data: a recipe's `[data]` table as checked rows in their splits."""

from raykd.data.rows import SPLITS, Dataset, Rows
from raykd.data.sources import load, open_source
from raykd.data.table import Part, Table

__all__ = ["SPLITS", "Dataset", "Part", "Rows", "Table", "load", "open_source"]
