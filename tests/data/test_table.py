"""Laws of parts: rows in memory are a source of the same rows, with their digest and ids."""

import pickle

import numpy as np

from raykd import data
from raykd.data import SPLITS
from raykd.data.table import Held, Part, Table, joined, read_split
from raykd.recipe.tables import DataRef


def test_rows_in_memory_are_a_source_of_the_same_rows():
    dataset = data.load(DataRef(split="subject", limit=300, label_fraction=0.1))
    source = Held(dataset)
    table = source.table()
    assert source.table() is table
    assert (table.digest, table.classes, table.shape) == (
        dataset.digest,
        dataset.classes,
        dataset.shape,
    )
    assert not table.is_text
    for split in SPLITS:
        rows = dataset.splits[split]
        assert table.rows(split) == len(rows)
        assert sum(part.labelled for part in table.of(split)) == rows.labelled.sum()
        assert read_split(source, split) is rows
    assert pickle.loads(pickle.dumps(source)).table() == table


def test_parts_that_are_joined_are_the_split():
    rows = data.load(DataRef(limit=50)).splits["train"]
    again = joined([rows.take(slice(0, 20)), rows.take(slice(20, 21)), rows.take(slice(21, 50))])
    for key, values in vars(rows).items():
        assert values is None or np.array_equal(values, getattr(again, key))


def test_a_parts_ids_leave_room_for_its_rows():
    parts = [Part(number, "train", 1 << 24, 0, "a", number) for number in range(3)]
    assert [part.first_id for part in parts] == [0, 1 << 24, 2 << 24]
    table = Table("rows", "series", ("a",), {}, "0", tuple(parts))
    assert table.rows("train") == 3 << 24
    assert table.of("val") == ()
