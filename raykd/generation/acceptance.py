"""How a student does as its teacher's drafter: a row for each text that the two write together.

*Acceptance* is the mean of sum min(p, q) over the tested drafted tokens: those up to the first
rejection of each draft. *Block efficiency* is the number of tokens written per call of the teacher.
Both depend on the texts of this pair. *Overlap* is the mean of sum min(p, q) over all tokens of
texts that the teacher wrote alone, the same texts for every drafter. So it separates two drafters
with far fewer texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.files import parquet
from raykd.files.atomic import write_bytes


@dataclass(frozen=True)
class Acceptance:
    """Sums over n texts that a teacher and a drafter wrote together, each (n,)."""

    row_id: NDArray[np.int64]  # the test row that each text continues
    group: NDArray[np.int64]  # its document
    overlap: NDArray[np.float64]  # sum min(p, q), summed over the `tested` tokens
    tested: NDArray[np.int64]
    accepted: NDArray[np.int64]  # of the tested
    tokens: NDArray[np.int64]  # written
    calls: NDArray[np.int64]  # of the teacher
    # sum min(p, q), summed over `places` of the teacher's own text; None in files without it
    shared: NDArray[np.float64] | None = None
    places: NDArray[np.int64] | None = None

    def write(self, path: Path) -> None:
        """Write a Parquet table, one row a text."""
        columns: dict[str, Any] = dict(vars(self))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(path, sink.getvalue().to_pybytes())


def read_acceptance(path: Path) -> Acceptance:
    """What `Acceptance.write` wrote. StoreError if that is not what is there."""
    try:
        table = parquet.read(path)
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        return Acceptance(**columns)
    except (pa.ArrowException, OSError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged: {error}; delete {path.parent} and run again"
        ) from None
