"""Reading a store: only what the manifest names, only what its digests confirm."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.files import parquet
from raykd.files.address import Address
from raykd.files.open import open_place
from raykd.files.place import Place
from raykd.store import bounds, layer_signals, node_copy
from raykd.store.codecs import Codec
from raykd.store.logits import StoredLogits, in_plain_layout
from raykd.store.manifest import PART, read_manifest
from raykd.store.stored_rows import Column, StoredRows, column_of, logits_of


class Store:
    """A complete, verified store. StoreError if it is none, or not the one that its name says."""

    def __init__(self, where: Address | Place):
        self.place = open_place(where)
        self.manifest: dict[str, Any] = read_manifest(self.place)
        self._splits: dict[str, pa.Table] = {}
        self._row_ids: dict[str, NDArray[np.int64]] = {}
        self._layers: frozenset[str] = frozenset()  # the signals of which this is the store

    @property
    def folder(self) -> Address:
        return self.place.address

    @classmethod
    def of_shards(cls, where: Address | Place, records: Sequence[dict[str, Any]]) -> "Store":
        """A view of committed shards before there is a manifest; it is read shard by shard."""
        store = cls.__new__(cls)
        store.place = open_place(where)
        store.manifest = {"shards": records}
        store._splits = {}
        store._row_ids = {}
        store._layers = frozenset()
        return store

    def shards(self, split: str) -> Iterator[pa.Table]:
        """The shards of one split in turn, each verified by digest, bounds and page checksums."""
        for record in self.manifest["shards"]:
            if record["split"] == split:
                yield read_shard(self.place, record)

    def table(self, split: str) -> pa.Table:
        """All rows of one split, memory mapped from this node's copy, ids in the plain layout."""
        if split not in self._splits:
            shards = map(in_plain_layout, self.shards(split))
            self._splits[split] = node_copy.mapped(self.manifest["sha256"], split, shards)
        return self._splits[split]

    def row_id(self, split: str) -> NDArray[np.int64]:
        if split not in self._row_ids:
            self._row_ids[split] = self.column("row_id", split).values
        return self._row_ids[split]

    def unscored(self, split: str) -> int:
        """How many rows of a split could not be scored and are left out."""
        records = [record for record in self.manifest["shards"] if record["split"] == split]
        return sum(record["last"] - record["first"] - record["rows"] for record in records)

    def places_of(self, row_id: NDArray[np.int64], split: str) -> NDArray[np.int64]:
        """(N,): the place of each row among the split's stored rows; -1 where it is not stored.

        This is how rows of data meet the teacher's answers: by their ids, never by their order.
        """
        stored = self.row_id(split)
        place = np.searchsorted(stored, row_id)
        is_stored = np.zeros(len(row_id), bool)
        inside = place < len(stored)
        is_stored[inside] = stored[place[inside]] == row_id[inside]
        return np.where(is_stored, place, -1)

    def aligned(
        self, name: str, split: str, row_id: NDArray[np.int64], missing: float
    ) -> NDArray[Any]:
        """(N,): a signal of one value a row, for just these rows.

        Rows that could not be scored have the value `missing`.
        """
        values = self.column(name, split).values
        place = self.places_of(row_id, split)
        is_stored = place >= 0
        out = np.full(len(row_id), missing, values.dtype)
        out[is_stored] = values[place[is_stored]]
        return out

    def stepwise(
        self, name: str, split: str, row_id: NDArray[np.int64], steps: NDArray[Any]
    ) -> NDArray[Any]:
        """(sum of `steps`,): a signal of one value a step, for just these rows.

        Rows that could not be scored have -1 (int32) or NaN at each of their steps.
        """
        column = self.column(name, split)
        place = self.places_of(row_id, split)
        is_stored = place >= 0
        is_wanted = np.zeros(len(column.steps), bool)
        is_wanted[place[is_stored]] = True
        missing: Any = -1 if column.values.dtype == np.int32 else np.nan
        at = np.repeat(is_stored, steps)
        out = np.full(len(at), missing, column.values.dtype)
        out[at] = column.values[np.repeat(is_wanted, column.steps)]
        return out

    def column(self, name: str, split: str) -> Column:
        """One signal of one split; StoreError lists the stored ones if it is not among them.

        It is read shard by shard, or out of the node's copy where that is open.
        """
        if "." in name and name not in self._layers:
            return self._layer(name, split).column(name, split)
        table = self._splits.get(split)
        return column_of(self._from_shards(name, split) if table is None else table, name)

    def stored(self, split: str, layers: Iterable[str] = ()) -> StoredRows:
        """All that the store holds of a split's rows; of inner layers only those that are named."""
        tables = {"": self.table(split)}
        for name in layers:
            tables[name] = self._layer(name, split).table(split)
        return StoredRows(tables)

    def layer(self, name: str) -> "Store":
        """The finished store of an inner layer's signal. StoreError if it is another store's."""
        store = Store(layer_signals.place_of(self.place, name))
        if store.manifest["identity"] != self.manifest["identity"] | {"signal": name}:
            raise StoreError(
                f"{store.place} is a layer of another store; delete that folder, then type: "
                "raykd score RECIPE"
            )
        store._layers = frozenset({name})
        return store

    def _layer(self, name: str, split: str) -> "Store":
        """The store of an inner layer's signal. StoreError if it is not there, or of other rows."""
        place = layer_signals.place_of(self.place, name)
        if place.get("_MANIFEST.json") is None:
            layers = [layer.name for layer in layer_signals.stores_below(self.place)]
            known = ", ".join([*next(self.shards(split)).column_names, *layers])
            raise StoreError(
                f"store {self.place.name} holds no {name!r}; it has {known}; "
                "`raykd score RECIPE` adds it"
            )
        layer_store = self.layer(name)
        if not np.array_equal(layer_store.row_id(split), self.row_id(split)):
            raise StoreError(
                f"{place} is of other rows than its store; type: raykd store repair {self.place}"
            )
        return layer_store

    def logits(self, split: str) -> StoredLogits:
        """The teacher's answers of one split, still encoded."""
        return logits_of(self.table(split))

    def serves(self, split: str, temperature: float) -> bool:
        """Whether the KL to the answers of a split at a temperature has no bias."""
        return logits_of(next(self.shards(split))).serves(temperature)

    def codec(self, split: str) -> Codec:
        """The codec of a split's answers, by its first shard."""
        return logits_of(next(self.shards(split))).codec

    def _from_shards(self, name: str, split: str) -> pa.Table:
        """A column, and the one that counts its steps, of every shard; no other is unpacked."""

        def with_steps(schema: pa.Schema) -> list[str]:
            if name not in schema.names:
                raise StoreError(
                    f"store {self.place.name} holds no {name!r}; it has {', '.join(schema.names)}"
                )
            metadata = schema.field(name).metadata or {}
            return [name, *([metadata[b"steps"].decode()] if b"steps" in metadata else [])]

        records = [record for record in self.manifest["shards"] if record["split"] == split]
        return pa.concat_tables([read_shard(self.place, each, with_steps) for each in records])


def read_shard(
    place: Place, record: dict[str, Any], columns: Callable[[pa.Schema], list[str]] | None = None
) -> pa.Table:
    """A shard's rows, verified by digest, bounds and page checksums. StoreError otherwise.

    `columns` tells those to unpack from the file's own; without it all are.
    """
    if not PART.fullmatch(record["file"]):
        raise StoreError(f"{place}: a record names {record['file']!r}, which is no shard's file")
    path = f"{place}/{record['file']}"
    again = f"type: raykd store repair {place}, then `raykd score` does just this shard again"
    data = place.get(record["file"])
    if data is None:
        raise StoreError(f"{path} is missing; {again}")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise StoreError(f"{path} is damaged: its sha256 is not the manifest's; {again}")
    if not 0 <= record["rows"] <= record["last"] - record["first"]:
        raise StoreError(
            f"{path}: {record['rows']} rows cannot be of {record['last'] - record['first']}"
        )
    return read_parquet(data, record["rows"], path, columns)


def read_parquet(
    data: bytes,
    rows: int,
    name: str,
    columns: Callable[[pa.Schema], list[str]] | None = None,
) -> pa.Table:
    """The rows of a Parquet file, read only if its bounds are sound. StoreError otherwise."""
    bounds.check(data, rows, name)
    try:
        file = parquet.opened(data)
        names = columns(file.schema_arrow) if columns else None
        table = file.read(columns=names, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{name} is not a readable Parquet file: {error}") from None
    return table
