"""Reading a store: only what the manifest names, only what its digests confirm."""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.files.address import Address
from raykd.files.digests import digest_of
from raykd.files.open import open_place
from raykd.files.place import Place, read_json_in
from raykd.store import bounds, layer_signals, node_copy
from raykd.store.columns import decode
from raykd.store.logits import StoredLogits, from_metadata, plain

PART = re.compile(r"data/part-\d{5,}-[0-9a-f]{16}\.parquet")


@dataclass(frozen=True)
class Column:
    """One stored signal of one split: flat valid steps, and how many belong to each row."""

    values: NDArray[Any]  # (sum of steps, ...) for step columns, (N,) for row columns
    steps: NDArray[np.int32]  # (N,)

    def padded(self, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """(N, T, ...): the steps at their places in `mask`; T = 1 for a teacher that answers once a
        sequence.
        """
        if (self.steps == 1).all() and mask.shape[1] > 1:
            return self.values[:, None]
        if not np.array_equal(self.steps, mask.sum(1)):
            raise StoreError("the store's steps do not fit the data's; it belongs to other rows")
        out = np.zeros((*mask.shape, *self.values.shape[1:]), self.values.dtype)
        out[mask] = self.values
        return out


class Store:
    """A complete, verified store."""

    def __init__(self, where: Address | Place):
        self.place = place = open_place(where)
        manifest = read_json_in(place, "_MANIFEST.json")
        if manifest is None:
            raise StoreError(
                f"{place} is not a complete store: it has no manifest; run `raykd score` to finish it"
            )
        body = {k: v for k, v in manifest.items() if k != "sha256"}
        if digest_of(body) != manifest.get("sha256"):
            raise StoreError(
                f"{place}/_MANIFEST.json is damaged: its digest does not match; type: raykd store repair {place}"
            )
        self.manifest: dict[str, Any] = manifest
        self._splits: dict[str, pa.Table] = {}
        self._layers: frozenset[str] = frozenset()  # the signals that this is the own store of

    @property
    def folder(self) -> Address:
        return self.place.address

    @classmethod
    def of_shards(cls, where: Address | Place, records: list[dict[str, Any]]) -> "Store":
        """A view of committed shards before there is a manifest: its columns, read shard by shard."""
        store = cls.__new__(cls)
        store.place, store.manifest, store._splits, store._layers = (
            open_place(where),
            {"shards": records},
            {},
            frozenset(),
        )
        return store

    def shards(self, split: str) -> Iterator[pa.Table]:
        """The shards of one split in turn, each verified by digest, bounds and page checksums."""
        return (read_shard(self.place, r) for r in self.manifest["shards"] if r["split"] == split)

    def table(self, split: str) -> pa.Table:
        """All rows of one split, memory mapped from this node's copy; ids are in the plain layout."""
        if split not in self._splits:
            self._splits[split] = node_copy.mapped(
                self.manifest["sha256"], split, map(plain, self.shards(split))
            )
        return self._splits[split]

    def row_id(self, split: str) -> NDArray[np.int64]:
        return self.column("row_id", split).values

    def unscored(self, split: str) -> int:
        """How many rows of a split could not be scored and are left out."""
        return sum(
            r["last"] - r["first"] - r["rows"]
            for r in self.manifest["shards"]
            if r["split"] == split
        )

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
        """One signal of one split; StoreError lists what there is if it is not stored."""
        if "." in name and name not in self._layers:
            return self._layer(name, split).column(name, split)
        table = self.table(split) if "sha256" in self.manifest else self._only(name, split)
        field = self._field(table, name)
        if field.type != pa.binary():
            return Column(table.column(name).to_numpy(), np.ones(table.num_rows, np.int32))
        shape = json.loads(field.metadata[b"shape"])
        steps = table.column(field.metadata[b"steps"].decode()).to_numpy()
        kind = field.metadata.get(b"dtype", b"float16").decode()
        return Column(decode(table.column(name), shape, steps, kind), steps)

    def _layer(self, name: str, split: str) -> "Store":
        """The store of an inner layer's signal. StoreError if it is not there, or of other rows."""
        place = layer_signals.place_of(self.place, name)
        if place.get("_MANIFEST.json") is None:
            held = [
                *self.table(split).column_names,
                *(layer.name for layer in layer_signals.stored(self.place)),
            ]
            raise StoreError(
                f"store {self.place.name} holds no {name!r}; it has {', '.join(held)}; `raykd score RECIPE` adds it"
            )
        found = Store(place)
        found._layers = frozenset({name})
        if not np.array_equal(found.row_id(split), self.row_id(split)):
            raise StoreError(
                f"{place} is of other rows than its store; type: raykd store repair {self.place}"
            )
        return found

    def logits(self, split: str) -> StoredLogits:
        """The teacher's answers of one split, still encoded."""
        table = self.table(split)
        codec, layout = from_metadata(table.schema.field("logits").metadata)
        return StoredLogits(table.column("logits"), table.column("steps").to_numpy(), codec, layout)

    def _only(self, name: str, split: str) -> pa.Table:
        """A column, and the one that counts its steps, of every shard."""
        parts = []
        for shard in self.shards(split):
            steps = (self._field(shard, name).metadata or {}).get(b"steps")
            parts.append(shard.select([name, *([steps.decode()] if steps else [])]))
        return pa.concat_tables(parts)

    def _field(self, table: pa.Table, name: str) -> pa.Field:
        if name not in table.column_names:
            raise StoreError(
                f"store {self.place.name} holds no {name!r}; it has {', '.join(table.column_names)}"
            )
        return table.schema.field(name)


def read_shard(place: Place, record: dict[str, Any]) -> pa.Table:
    """A shard's rows, verified by digest, by the bounds of what it may decode to, and by page
    checksums.
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
            f"{path}: {record['rows']} rows can not be of {record['last'] - record['first']}"
        )
    return decoded(data, record["rows"], path)


def decoded(data: bytes, rows: int, name: str) -> pa.Table:
    """The rows of a Parquet file, once its bounds are known to be sound. StoreError otherwise."""
    bounds.check(data, rows, name)
    try:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{name} is not a readable Parquet file: {error}") from None
    return table
