"""A file of a source as Python's file object, read in the ranges that a reader asks for."""

import io
from collections.abc import Sequence
from typing import Any

from raykd.files.data_files import DataFile, DataFiles

GAP = 1 << 20  # bytes that are fetched needlessly rather than asked for apart


class RangeFile(io.RawIOBase):
    """Reads of a file's ranges; those that `fetch` has brought cost no further request."""

    def __init__(self, files: DataFiles, file: DataFile):
        super().__init__()
        self.files = files
        self.file = file
        self.at = 0
        self.fetched: list[tuple[int, bytes]] = []  # (first byte, bytes)
        if not file.bytes:
            files.read(file, 0, 0)  # which says why, where it is no file at all

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Read (first, end) ranges, near ones as one, and let go of those from before."""
        joined: list[tuple[int, int]] = []
        for first, end in sorted(ranges):
            if joined and first - joined[-1][1] <= GAP:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((first, end))
        self.fetched = []
        for first, end in joined:
            self.fetched.append((first, self.files.read(self.file, first, end - first)))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.bytes}[whence]
        self.at = base + offset
        return self.at

    def read(self, count: int | None = -1) -> Any:
        left = max(self.file.bytes - self.at, 0)
        count = left if count is None or count < 0 else min(count, left)
        data = self._range(self.at, count)
        self.at += count
        return data

    def _range(self, first: int, count: int) -> bytes | memoryview:
        for start, data in self.fetched:
            if start <= first and first + count <= start + len(data):
                return memoryview(data)[first - start : first - start + count]
        return self.files.read(self.file, first, count)
