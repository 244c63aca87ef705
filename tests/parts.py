"""Rows in memory as a source of many parts, which counts what is read of it."""

from dataclasses import dataclass, field, replace

from raykd.data import Dataset, Rows
from raykd.data.table import Held, Part, Table


@dataclass(frozen=True)
class Cut:
    """A data set cut into parts of so many rows."""

    dataset: Dataset
    rows: int
    read_parts: list[int] = field(default_factory=list)  # the numbers of what was read

    def table(self) -> Table:
        whole = Held(self.dataset).table()
        parts: list[Part] = []
        for split, rows in self.dataset.splits.items():
            for group, first in enumerate(range(0, len(rows), self.rows)):
                here = rows.take(slice(first, first + self.rows))
                labelled = int(here.labelled.sum())
                parts.append(Part(len(parts), split, len(here), labelled, "", group))
        return replace(whole, parts=tuple(parts))

    def read(self, part: Part) -> Rows:
        self.read_parts.append(part.number)
        first = part.group * self.rows
        return self.dataset.splits[part.split].take(slice(first, first + self.rows))
