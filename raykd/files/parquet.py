"""Parquet read in one way everywhere: page checksums are verified, and no thread is started.

Arrow's threads must not outlive a command: beside torch, a process that ends while they run is
aborted in a quarter of all cases.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO, RawIOBase
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a file or of a file's bytes; `columns` names those to read, by default all.

    An ArrowException or OSError if it is damaged or no Parquet file.
    """
    file = opened(source)
    return file.read(columns=None if columns is None else list(columns), use_threads=False)


def opened(
    source: Path | bytes | RawIOBase, footer: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """A file of which only the footer is read yet, unless it is given.

    `read` it with `use_threads = False`, or in `batches`.
    """
    where = BytesIO(source) if isinstance(source, bytes) else source
    return pq.ParquetFile(where, metadata=footer, page_checksum_verification=True, pre_buffer=False)


def batches(
    file: pq.ParquetFile, group: int, columns: Sequence[str], rows: int
) -> Iterator[pa.RecordBatch]:
    """The rows of one row group, at most `rows` at a time."""
    return file.iter_batches(
        batch_size=rows, row_groups=[group], columns=list(columns), use_threads=False
    )
