"""How a student did as its teacher's drafter, kept with its arm: a row for each text that both
wrote.

Acceptance is the mean of sum min(p, q) over the drafted tokens that were tested, which are those up
to the first rejection of a draft; block efficiency is the tokens written for each call of the
teacher. Both are of the texts that this pair wrote. Overlap is the mean of sum min(p, q) over all
tokens of texts that the teacher wrote by itself: what a draft would be accepted with at each, on
the same texts for every drafter, so that two are told apart by far fewer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.files.atomic import write_bytes


@dataclass(frozen=True)
class Acceptance:
    """n texts written together: the sum of sum min(p, q) over `tested` tokens, of which `accepted`
    stayed.
    """

    row_id: NDArray[np.int64]  # (n,) the test row that each text begins as
    group: NDArray[np.int64]  # (n,) its document
    overlap: NDArray[np.float64]  # (n,) over tested tokens, which acceptance is made of
    tested: NDArray[np.int64]  # (n,)
    accepted: NDArray[np.int64]  # (n,)
    tokens: NDArray[np.int64]  # (n,) written
    calls: NDArray[np.int64]  # (n,) of the teacher
    shared: NDArray[np.float64] | None = (
        None  # (n,) the sum of sum min(p, q) over `places` of the teacher's own text
    )
    places: NDArray[np.int64] | None = None  # (n,); both None in a file from before they were told

    def write(self, path: Path) -> None:
        """A Parquet table, one row a text."""
        columns: dict[str, Any] = dict(vars(self))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(path, sink.getvalue().to_pybytes())


def read_acceptance(path: Path) -> Acceptance:
    """What `Drafts.write` wrote."""
    table = pq.read_table(path)
    return Acceptance(**{name: table.column(name).to_numpy() for name in table.column_names})
