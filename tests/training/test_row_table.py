"""Rows survive the way through a table of records, however odd the size of a record is."""

import numpy as np
import pytest

from raykd.data import Rows
from raykd.signals import as_tensor
from raykd.training.row_table import row_table, rows_of


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_rows_of_a_table_are_the_rows_and_can_be_tensors(count, steps):
    """A record of one row is contiguous whatever its stride, which no tensor can have."""
    rows = Rows(
        row_id=np.arange(6),
        inputs=np.arange(6.0 * steps * 2).reshape(6, steps, 2).astype(np.float32),
        mask=np.ones((6, steps), bool),
        label=np.arange(6) % 2,
        group=np.arange(6),
        valence=np.full((6, steps), 0.5, np.float32),
    )
    index = np.arange(count)[::-1]
    found = rows_of(row_table(rows).take(index))
    for name, values in vars(rows.take(index)).items():
        assert np.array_equal(as_tensor(getattr(found, name)).numpy(), values)
