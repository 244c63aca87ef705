"""A split that is read in parts, each row beside its teacher's answers.

Nothing here grows with the data but the table of parts, and with row weights of the whole data set
8 bytes of saliency a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.data import Rows
from raykd.data.order import Order, labelled_rows
from raykd.data.table import Part, Source
from raykd.data.walk import Walk
from raykd.errors import DataError, RecipeError, StoreError
from raykd.files.digests import digest_of
from raykd.recipe.recipe import Scale
from raykd.recipe.tables import Optim
from raykd.signals import Batch, as_tensor
from raykd.store.layer_signals import is_signal
from raykd.store.logits import in_plain_layout
from raykd.store.reader import Store, read_shard
from raykd.store.stored_rows import StoredRows, steps_of
from raykd.training.device_rows import DeviceRows, beside
from raykd.training.row_table import row_table, rows_of
from raykd.training.shelf import GB, Shelf, Volume

FORM = 1  # of the files on the shelf
SCALE = Scale()
Ints = NDArray[np.int64]


class PartRows:
    """The rows of one split; sibling of DeviceRows.

    A position is that among the rows that are seen: all of the split, in their order, but
    those that the teacher could not score. `needs` are the teacher's signals that terms read.
    """

    def __init__(
        self,
        source: Source,
        split: str,
        store: Store | None,
        needs: frozenset[str],
        device: torch.device,
        head: tuple[Tensor, Tensor | None] | None = None,
        scale: Scale = SCALE,
    ):
        self.shelf = Shelf(scale.cache_gb, scale.readers)
        self.needs = needs
        self.device = device
        self.head = head
        self.readers = scale.readers
        self.workers = scale.workers[1]  # that share the lanes, at most
        self.rows = rows_volume(source, split)
        self.signals = {} if store is None else signal_volumes(store, split, needs)
        parts = source.table().of(split)
        self.missing = self._missing(store, split) if store else np.zeros(0, np.int64)
        self.sizes = self.rows.sizes - self._counts(self.missing)
        hidden = self.missing
        if len(hidden):
            hidden = hidden[self._rows(hidden).labelled]
        self.labelled_sizes = np.array([part.labelled for part in parts]) - self._counts(hidden)
        self.first = np.cumsum(self.sizes) - self.sizes  # (S,) each part's first position
        self.once = {name: self._is_once(name) for name in sorted(needs | {"logits"}) if store}

    @property
    def row_shape(self) -> torch.Size:
        """The shape of one row's inputs, (T, K)."""
        return self._example.inputs.shape[1:]

    @property
    def teaches_logits(self) -> bool:
        """Whether the teacher's distribution at temperature 1 is known."""
        return self._example.teaches_logits

    @property
    def saliency(self) -> Tensor | None:
        """(N,): of all rows, read part by part; None in a store that was written without it."""
        return self._saliency

    @cached_property
    def _saliency(self) -> Tensor | None:
        if not self.signals:
            return None
        volume = self.signals[""]
        pieces = []
        for number in range(len(volume.sizes)):
            table = self.shelf.table(volume, number)
            if "saliency" not in table.schema.names:
                return None
            pieces.append(table.column("saliency").to_numpy())
        return as_tensor(np.concatenate(pieces)).to(self.device)

    def order(self, optim: Optim, seed: int) -> Order:
        """The rows of every global batch, in lanes over the parts."""
        self._check_room(optim)
        total = int(self.sizes.sum())
        count = labelled_rows(optim, int(self.labelled_sizes.sum()), total)
        labelled_of = lru_cache(optim.lanes * (optim.window + 2))(self._labelled_of)
        pools = [(self.labelled_sizes, count, labelled_of), (self.sizes, optim.batch - count, None)]
        return Order(
            [
                PartStream(
                    Walk(sizes, size, optim.lanes, optim.window, seed, tag),
                    optim.steps,
                    self.first,
                    of,
                )
                for tag, (sizes, size, of) in enumerate(pools)
                if size
            ]
        )

    def expect(self, order: Order, step: int, share: slice) -> None:
        """Begin to fetch the parts that a share of the batches needs some steps later."""
        for stream, _, which in order.dealt(share):
            assert isinstance(stream, PartStream)
            for part in stream.ahead(step, which):
                self._begin(int(part))

    def batch(self, index: Tensor, noise: Tensor | None = None) -> Batch:
        """The rows at `index` (B,), with `noise` (B, T, K) added to valid inputs."""
        here = self._at(index.cpu().numpy())
        everything = torch.arange(len(index), device=self.device)
        return replace(here.batch(everything, noise), split=NoSplit())

    def close(self) -> None:
        """End the threads that read."""
        self.shelf.close()

    @cached_property
    def _example(self) -> DeviceRows:
        return self._at(np.zeros(1, np.int64))

    def rows_at(self, index: Ints) -> Rows:
        """The rows at these positions."""
        return self._rows(self._in_data(index))

    def begin(self, first: int, last: int) -> None:
        """Begin to fetch the parts of the rows at positions from `first` to before `last`."""
        edges = np.array([first, last - 1])
        begin, end = self.rows.located(self._in_data(edges))[0]
        for part in range(begin, end + 1):
            self._begin(part)

    def _at(self, index: Ints) -> DeviceRows:
        """The rows at these positions alone, beside their signals."""
        return self.beside(self.rows_at(index), index)

    def beside(self, rows: Rows, index: Ints) -> DeviceRows:
        """The rows at these positions, given, beside their signals; joined by position and held
        against each other by their ids.
        """
        if not self.signals:
            return beside(rows, None, self.needs, self.device)
        tables = {name: self.shelf.rows(volume, index) for name, volume in self.signals.items()}
        for table in tables.values():
            if not np.array_equal(table.column("row_id").to_numpy(), rows.row_id):
                raise StoreError("the store holds other rows than the data")
        return beside(rows, StoredRows(tables, self.once), self.needs, self.device, self.head)

    def _rows(self, index: Ints) -> Rows:
        """The rows at these positions of the data."""
        return rows_of(self.shelf.rows(self.rows, index))

    def _in_data(self, index: Ints) -> Ints:
        """The positions in the data, where `missing` rows count, of these positions."""
        before = self.missing - np.arange(len(self.missing))
        return index + np.searchsorted(before, index, side="right")

    def _counts(self, index: Ints) -> Ints:
        """(S,): how many of these positions of the data each part has."""
        return np.bincount(self.rows.located(index)[0], minlength=len(self.rows.sizes))

    def _missing(self, store: Store, split: str) -> Ints:
        """The positions in the data of the rows that the store lacks, which ascend."""
        volume = self.signals[""]
        records = records_of(store, split)
        if records[-1]["last"] != self.rows.sizes.sum():
            raise StoreError("the store holds other rows than the data")
        missing = [np.zeros(0, np.int64)]
        for number, record in enumerate(records):
            here = np.arange(record["first"], record["last"])
            if record["rows"] < len(here):
                table = self.shelf.table(volume, number)
                scored = np.isin(self._rows(here).row_id, table.column("row_id").to_numpy())
                missing.append(here[~scored])
        return np.concatenate(missing)

    def _is_once(self, name: str) -> bool:
        """Whether the teacher gives a signal once a sequence, by the first rows that tell it."""
        volume = self.signals.get(name, self.signals[""])
        first = 0
        for number, size in enumerate(volume.sizes):
            table = self.shelf.table(volume, number)
            rows = self._rows(self._in_data(np.arange(first, first + size)))
            if rows.is_text or (steps_of(table, name) != 1).any():
                return False
            if (rows.mask.sum(1) != 1).any():
                return True
            first += int(size)
        return self.row_shape[0] > 1

    def _labelled_of(self, part: int) -> NDArray[np.int32]:
        """The places of a part's labelled rows among those that training sees."""
        index = np.arange(self.first[part], self.first[part] + self.sizes[part])
        return np.flatnonzero(self._rows(self._in_data(index)).labelled).astype(np.int32)

    def _begin(self, part: int) -> None:
        """Begin to fetch a part and the signals of its rows."""
        self.shelf.begin(self.rows, [part])
        edges = self.first[part] + np.array([0, max(self.sizes[part] - 1, 0)])
        for volume in self.signals.values():
            first, last = volume.located(edges)[0]
            self.shelf.begin(volume, range(first, last + 1))

    def _check_room(self, optim: Optim) -> None:
        """RecipeError where the lanes of one worker read more at a time than the node may keep."""
        of_row = 0.0
        for volume in (self.rows, *self.signals.values()):
            table = self.shelf.table(volume, 0)
            of_row += table.nbytes / max(table.num_rows, 1)
        lanes = -(-min(optim.lanes, optim.batch) // self.workers)
        parts = min(lanes * (optim.window + 1), len(self.sizes))
        needed = of_row * parts * int(self.sizes.max())
        if needed > self.shelf.room:
            raise RecipeError(
                f"scale.cache_gb = {self.shelf.room / GB:g}: a worker reads {parts} parts at a "
                f"time, which take {needed / GB:.3g} GB; raise it, or lower optim.lanes or "
                "optim.window"
            )


@dataclass(frozen=True)
class PartStream:
    """A stream of positions: what a walk over parts gives, each part's rows from its first on.

    `chosen` are the places in a part that the walk counts, where these are not all.
    """

    walk: Walk
    steps: int  # of the training
    first: Ints  # (S,)
    chosen: Callable[[int], NDArray[np.int32]] | None = None

    @property
    def size(self) -> int:
        return self.walk.size

    def rows(self, step: int, which: Ints) -> Ints:
        part, place = self.walk.at(step, which)
        if self.chosen:
            pairs = zip(part.tolist(), place.tolist(), strict=True)
            place = np.array([self.chosen(part)[place] for part, place in pairs], np.int64)
        return self.first[part] + place

    def ahead(self, step: int, which: Ints) -> Ints:
        """The parts that these places of the batch come to when the next lane begins a window."""
        later = step + self.walk.turn
        return np.unique(self.walk.at(later, which)[0]) if later < self.steps else which[:0]


class NoSplit:
    """In place of the whole split, which a training in parts has not at hand."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RecipeError(
            f"a term reads {name!r} of the whole split, which is not at hand where rows are read "
            'in parts; write optim.order = "rows", or for infonce negatives = 0'
        )


def rows_volume(source: Source, split: str) -> Volume:
    """The parts of a split, each as one table of records."""
    table = source.table()
    parts = table.of(split)

    def fetch(number: int) -> pa.Table:
        return row_table(_checked(source.read(parts[number]), parts[number], table.name))

    sizes = [part.rows for part in parts]
    key = digest_of({"form": FORM, "rows": table.digest, "split": split, "sizes": sizes})
    return Volume(key, np.array(sizes, np.int64), fetch)


def _checked(rows: Rows, part: Part, name: str) -> Rows:
    """The rows of a part. DataError if they are not as many as the table says."""
    found = (len(rows), int(rows.labelled.sum()))
    if found != (part.rows, part.labelled):
        raise DataError(
            f"{name}: {part.file or part.split} has {found[0]} rows, {found[1]} with a label, "
            f"where {part.rows} and {part.labelled} were listed; it has changed, so give the "
            "command again"
        )
    return rows


def signal_volumes(store: Store, split: str, needs: frozenset[str]) -> dict[str, Volume]:
    """A store's shards of a split: under "" the answers, under its name each inner layer."""
    stores = {"": store} | {name: store.layer(name) for name in filter(is_signal, sorted(needs))}
    beside_answers = {"row_id", "steps", "valence_steps", "logits", "saliency", "answer"}
    volumes = {}
    for name, each in stores.items():
        records = records_of(each, split)
        key = digest_of({"form": FORM, "store": each.manifest["sha256"], "split": split})
        sizes = np.array([record["rows"] for record in records], np.int64)
        columns = beside_answers | (needs - stores.keys()) | {name}
        fetch = partial(_shard, each, records)
        volumes[name] = Volume(key, sizes, fetch, frozenset(columns))
    return volumes


def _shard(store: Store, records: Sequence[dict[str, Any]], number: int) -> pa.Table:
    return in_plain_layout(read_shard(store.place, records[number]))


def records_of(store: Store, split: str) -> list[dict[str, Any]]:
    """The shards of a split in the order of their rows.

    StoreError unless they follow each other.
    """
    records = [record for record in store.manifest["shards"] if record["split"] == split]
    records.sort(key=lambda record: record["first"])
    firsts = [record["first"] for record in records]
    if firsts != [0, *(record["last"] for record in records)][:-1]:
        raise StoreError(f"{store.place}: its shards of {split} do not follow each other")
    return records
