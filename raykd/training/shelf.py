"""The shelf of a node: parts of rows and of a teacher's answers, as Arrow files that are mapped.

    <cache>/parts/<key of a volume>/00000012.arrow     one record batch, not compressed

The cache is that of `store/node_copy`. All processes of the node share it. Whoever needs a part
that is not there fetches it, checked by its source, writes it under another name, syncs and renames
it, while others wait: what has a part's name was written whole. The parts that were used least
recently go when the room is full. A process that still reads one keeps its pages.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import InfraError, RecipeError
from raykd.files import waiting
from raykd.store.node_copy import cache_folder
from raykd.training.gather import Opened, opened, taken

LOCKS = 64  # of all parts; one part's is that of its number
GB = 1e9
ALONE = pa.ipc.IpcReadOptions(use_threads=False)


@dataclass(frozen=True)
class Volume:
    """Numbered tables that follow each other: the parts of a split, or the shards of a store."""

    key: str  # names its folder on the shelf; equal keys have equal tables
    sizes: NDArray[np.int64]  # (S,) rows of each
    fetch: Callable[[int], pa.Table]
    columns: frozenset[str] = frozenset()  # that are read; without any all of them

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(S,): the position after the last row of each."""
        return np.cumsum(self.sizes)

    def located(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(B,) the tables and (B,) the places in them of the rows at these positions."""
        number = np.searchsorted(self.ends, index, side="right")
        return number, index - (self.ends - self.sizes)[number]


class Shelf:
    """The parts that this process reads, mapped from the node's shelf.

    `room` is in gigabytes: of the node's files, and of what this process maps.
    """

    def __init__(self, room: float, readers: int = 1):
        self.room = room * GB
        self.folder = cache_folder() / "parts"
        self.pool = ThreadPoolExecutor(readers, "shelf")
        self.lock = threading.Lock()
        # in the order of their last use
        self.tables: OrderedDict[tuple[str, int], Future[Opened]] = OrderedDict()
        self.bytes: dict[tuple[str, int], int] = {}  # of those that are mapped

    def begin(self, volume: Volume, numbers: Iterable[int]) -> list[Future[Opened]]:
        """The tables of these numbers, as they come."""
        begun = []
        with self.lock:
            for number in map(int, numbers):
                key = (volume.key, number)
                if key not in self.tables:
                    self.tables[key] = self.pool.submit(self._open, volume, number)
                self.tables.move_to_end(key)
                begun.append(self.tables[key])
        return begun

    def table(self, volume: Volume, number: int) -> pa.RecordBatch:
        """A whole part."""
        return self.begin(volume, [number])[0].result().table

    def rows(self, volume: Volume, index: NDArray[np.int64]) -> pa.Table:
        """(B,): the rows at these positions of a volume, in this order."""
        number, place = volume.located(index)
        present, number = np.unique(number, return_inverse=True)
        tables = [table.result() for table in self.begin(volume, present if len(present) else [0])]
        return taken(tables, number, place)

    def close(self) -> None:
        """End the threads that read."""
        self.pool.shutdown(cancel_futures=True)

    def _open(self, volume: Volume, number: int) -> Opened:
        """A part, mapped; fetched first where the node has it not."""
        key = (volume.key, number)
        path = self.folder / volume.key / f"{number:08d}.arrow"
        try:
            table = _mapped(path)
            if table is None:
                with waiting.locked(self.folder / "locks" / str(number % LOCKS), wait=True):
                    table = _mapped(path)
                    if table is None:
                        table = self._written(path, volume.fetch(number))
        except BaseException:
            with self.lock:
                del self.tables[key]  # so that whoever needs it tries again
            raise
        if volume.columns:
            table = table.select([name for name in table.schema.names if name in volume.columns])
        self._keep(key, table.nbytes)
        return opened(table)

    def _keep(self, key: tuple[str, int], size: int) -> None:
        """Count a table that is mapped now, and let those go that were used longest ago."""
        with self.lock:
            self.bytes[key] = size
            oldest = [other for other in self.tables if other in self.bytes and other != key]
            for other in oldest:
                if sum(self.bytes.values()) <= self.room:
                    break
                del self.tables[other]
                del self.bytes[other]

    def _written(self, path: Path, table: pa.Table) -> pa.RecordBatch:
        """A table as a file under its name, whole, and mapped."""
        self._make_room(table.nbytes)
        staged = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as sink:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    columns = [column.combine_chunks() for column in table.columns]
                    writer.write_batch(pa.record_batch(columns, schema=table.schema))
                sink.flush()
                os.fsync(sink.fileno())
            mapped = _mapped(staged)
            os.replace(staged, path)
        except OSError as error:
            raise InfraError(
                f"{path.parent}: a part of the data cannot be kept on this node: "
                f"{error.strerror or error}; free that disk, lower scale.cache_gb, or set "
                "RAYKD_CACHE to a folder with more room"
            ) from None
        finally:
            staged.unlink(missing_ok=True)
        assert mapped is not None
        return mapped

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago, until `size` more bytes have room."""
        if size > self.room:
            raise RecipeError(
                f"scale.cache_gb = {self.room / GB:g}: one part of the data takes "
                f"{size / GB:.3g} GB; raise it"
            )
        files = []
        for path in self.folder.glob("*/*.*"):
            with suppress(FileNotFoundError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = size + sum(held for _, held, _ in files) - self.room
        for _, held, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= held


def _mapped(path: Path) -> pa.RecordBatch | None:
    """A file's table, mapped; None where there is none. Its use is noted."""
    try:
        with pa.memory_map(str(path)) as file:
            pages = file.read_buffer()  # they stay mapped, the descriptor is closed
        # from a buffer, which needs no threads of Arrow's
        table = pa.ipc.open_file(pa.BufferReader(pages), options=ALONE).get_batch(0)
        os.utime(path)
    except (FileNotFoundError, pa.ArrowInvalid):  # what is no such file is written again
        return None
    return table
