"""The work of preparing: units of a source in, committed parts out, then the manifest.

What the work reads is a listing of files, or a function. Files are read in units, in any order and
by any number of processes. A function is asked from its beginning: what is committed already is
passed over, but for the last unit, which must come out as before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import pyarrow as pa

from raykd.data import labels, python_library, tables, text
from raykd.data.arrow_columns import plain_type
from raykd.data.blocks import MISSING, Block, group_number
from raykd.data.column_names import PROMPTS, column_names
from raykd.data.file_rows import FileRows, block_of
from raykd.data.prepared.folder import PartTable, PreparedFolder
from raykd.data.prepared.series_parts import SeriesParts
from raykd.data.prepared.text_parts import SMALL, TextParts, layouts
from raykd.data.prepared.units import FileUnits, Unit
from raykd.data.rows import SPLITS, Unfit
from raykd.data.text import Document
from raykd.errors import DataError, StoreError
from raykd.files.address import Address
from raykd.files.data_files import open_files
from raykd.files.digests import digest_of, file_sha256
from raykd.recipe.digest import code_sha256
from raykd.recipe.tables import DataRef
from raykd.recipe.toml import is_path

FORM = 1  # of the files; rows that were prepared in another are prepared again
FUNCTION_BYTES = 16 << 20  # of what a function gives, about, that are one unit

SAMPLE = 100  # rows by which sizes are foretold
ROW_BYTES = 16  # beside a row's values
TEXTS = ("text", *PROMPTS)

Told = Callable[[int], None]  # of the rows that are done


class Estimate(NamedTuple):
    """What preparing takes; all but the last is 0 where a function gives the rows."""

    rows: int
    source_bytes: int
    disk_bytes: int
    row_bytes: int


@dataclass(frozen=True)
class Work:
    """How the rows of a recipe's data become parts in a folder below `home`."""

    ref: DataRef
    home: Address

    # what it is

    @cached_property
    def files(self) -> FileUnits | None:
        """The units of files; None where a function gives the rows."""
        if not is_path(self.ref.source):
            return None
        return FileUnits(FileRows(open_files(self.ref.source), self.ref))

    @cached_property
    def name(self) -> str:
        if self.files:
            return self.files.rows.files.name
        return self.ref.source.rpartition(":")[2]

    @property
    def is_whole(self) -> bool:
        """Whether rows hold whole prompts and completions."""
        return self.ref.tokenizer is not None and self.ref.columns.prompt is not None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the prepared rows depend on."""
        ref = self.ref
        told: dict[str, Any] = {"form": FORM, "columns": column_names(ref)}
        if ref.tokenizer:
            told["text"] = {
                "tokenizer": file_sha256(ref.tokenizer),
                "end": ref.end,
                "window": ref.window,
            }
        if self.files:
            return told | {"files": self.files.marks, "splits": ref.splits}
        told["settings"] = ref.settings
        if ":" in ref.source:
            return told | {"function": ref.source, "code": code_sha256(ref.source)}
        return told | {"source": ref.source, "rows": digest_of(python_library.records(ref))}

    @cached_property
    def folder(self) -> PreparedFolder:
        return PreparedFolder.of(self.home, self.identity)

    def __getstate__(self) -> dict[str, Any]:
        known = {key: vars(self)[key] for key in ("files", "folder") if key in vars(self)}
        return {"ref": self.ref, "home": self.home} | known

    # files

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of files."""
        return self.files.all if self.files else ()

    def missing(self) -> list[Unit]:
        """The units of files that are to be prepared still."""
        absent = set(self.folder.missing(unit.number for unit in self.units))
        return [unit for unit in self.units if unit.number in absent]

    def do(self, unit: Unit) -> int:
        """Prepare a unit of files and commit it; gives how many rows it has."""
        assert self.files is not None
        made = self._maker(unit.number)
        for some in self.files.read(unit):
            if self.ref.tokenizer:
                made.add_records(_records(some.batch.columns), some.name, some.batch.first)
            else:
                kind = _kind_of_column(some.batch.columns["label"].type)
                made.add_block(block_of(some.batch, some.name), some.name, kind)
        made.commit({})
        return made.rows

    def estimate(self) -> Estimate:
        """What preparing takes, by the first rows of the source.

        DataError where preparing would refuse these.
        """
        if self.files is None:
            some = next(iter(self.function_rows()), [])
            width = self._width_of(some[:SAMPLE])
            self._check_records(some[:SAMPLE])
            is_all = ":" not in self.ref.source  # a text that is shipped
            rows = len(some) if is_all else 0
            return Estimate(rows, 0, rows * width, width)
        found = next((self.files.read(unit) for unit in self.units), None)
        some = next(found, None) if found else None
        if some is None:
            raise DataError(f"{self.name}: 0 rows")
        sample = {key: column.slice(0, SAMPLE) for key, column in some.batch.columns.items()}
        records = _records(sample)
        if self.ref.tokenizer:
            self._check_records(records, some.name)
        else:
            self._check_block(block_of(some.batch._replace(columns=sample), some.name), some.name)
        rows = self.files.count()
        width = self._width_of(records)
        return Estimate(rows, self.files.bytes, rows * width, width)

    def _check_records(self, rows: Sequence[dict[str, Any]], name: str = "") -> None:
        """DataError where rows cannot be prepared, before any is."""
        name = name or self.name
        if self.ref.tokenizer:
            text.split_names([row["split"] for row in rows], name, self.ref)
            text.check_texts(rows, name, 0)
        elif rows:
            keys = column_names(self.ref)
            self._check_block(tables.block_of_records(rows, keys, name, self.ref, 0), name)

    def _check_block(self, block: Block, name: str) -> None:
        """DataError where a row of a block cannot be prepared; nothing is written."""
        for _ in SeriesParts(self.ref).add(block, name):
            pass

    def _width_of(self, rows: Sequence[dict[str, Any]]) -> int:
        """The bytes that a row takes before compression, by some of them."""
        if not rows:
            return 0
        if not self.ref.tokenizer:
            return sum(map(_size_of, rows)) // len(rows) + ROW_BYTES
        texts = [row[key] for row in rows for key in TEXTS if isinstance(row.get(key), str)]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encodings)
        return tokens * (2 if len(self.tokens) <= SMALL else 4) // len(rows) + ROW_BYTES

    # functions

    def do_function(self, told: Told) -> None:
        """Prepare all that a function gives; what was committed before is passed over."""
        numbers = count()
        passed = 0
        first = 0
        for rows in self._by_size():
            number = next(numbers)
            last = first + len(rows)
            record = self.folder.record(number) if number not in self._absent else None
            has_next = self.folder.record(number + 1) is not None
            if record is None or not has_next:
                self._do_rows(number, rows, first, record)
            elif (record["first"], record["last"]) != (first, last):
                raise self._gives_others()
            passed = number + 1
            first = last
            told(first)
        if not passed or self.folder.record(passed) is not None:
            raise self._gives_others() if passed else DataError(f"{self.name}: 0 rows")

    @cached_property
    def _absent(self) -> frozenset[int]:
        """Units of a function that are recorded, and are not as their record says."""
        recorded = range(len(self.folder.place.listed("_commits")))
        return frozenset(self.folder.missing(recorded))

    def _do_rows(
        self, number: int, rows: Sequence[dict[str, Any]], first: int, record: Any
    ) -> None:
        made = self._maker(number)
        if self.ref.tokenizer:
            made.add_records(rows, self.name, first)
        else:
            keys = column_names(self.ref)
            block = tables.block_of_records(rows, keys, self.name, self.ref, first)
            made.add_block(block, self.name, _kind_of_labels(row["label"] for row in rows))
        found = made.commit({"first": first, "last": first + len(rows)})
        if record is not None and _contents(found) != _contents(record):
            raise self._gives_others()

    def _gives_others(self) -> DataError:
        return DataError(
            f"data.source {self.ref.source}: gives other rows than when they began to be prepared; "
            f"let it give the same ones at every call, and delete {self.folder.address}"
        )

    def _by_size(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of a function, some megabytes at a time."""
        some: list[dict[str, Any]] = []
        size = 0
        for rows in self.function_rows():
            for row in rows:
                some.append(row)
                size += _size_of(row)
                if size >= FUNCTION_BYTES:
                    yield some
                    some = []
                    size = 0
        if some:
            yield some

    def function_rows(self) -> Iterable[list[dict[str, Any]]]:
        """The rows of a function, or of a text that is shipped, some at a time."""
        if ":" in self.ref.source:
            return tables.function_rows(self.ref)
        return [python_library.records(self.ref)]

    # the end

    def finish(self) -> dict[str, Any]:
        """Write the manifest once all units are committed, and give it."""
        records = self._records()
        unfit = [Unfit(*row) for record in records for row in record["unfit"]]
        self._check_kinds(records)
        parts = [part for split in SPLITS for part in _of_split(records, split)]
        if self.ref.tokenizer:
            train = [part for part in parts if part["split"] == "train"]
            found = layouts(train, self.ref.window, whole=self.is_whole)
            for part, layout in zip(train, found, strict=True):
                part |= layout._asdict()
                part.pop("lengths", None)
        else:
            self._check_channels(parts)
        self.folder.finish(
            {
                "parts": parts,
                "rows": sum(record["rows"] for record in records),
                "unfit": [list(row) for row in unfit],
                "cut": sum(record["cut"] for record in records),
            }
        )
        manifest = self.folder.manifest()
        assert manifest is not None
        return manifest

    def _records(self) -> list[dict[str, Any]]:
        """The records of all units in their order. StoreError names one that has none."""
        records: list[dict[str, Any]] = []
        while record := self.folder.record(len(records)):
            records.append(record)
        if self.files and len(records) != len(self.units):
            raise StoreError(
                f"{self.folder.address}: unit {len(records)} of {len(self.units)} is not prepared; "
                "give the same command again"
            )
        return records

    def _check_kinds(self, records: Sequence[dict[str, Any]]) -> None:
        """DataError where labels or groups are of several types, which are then told apart."""
        for key in ("label", "group") if self.files else ("label",):
            kinds = sorted({kind for record in records for kind in record["kinds"].get(key, ())})
            if len(kinds) > 1:
                raise DataError(
                    f"data.source {self.ref.source}: the column of each row's {key} is of type "
                    f"{' here and '.join(kinds)} there; give all rows one type, and delete "
                    f"{self.folder.address}"
                )

    def _check_channels(self, parts: Sequence[dict[str, Any]]) -> None:
        channels = sorted({part["channels"] for part in parts})
        if len(channels) > 1:
            raise DataError(
                f"data.source {self.ref.source}: some rows have steps of {channels[0]} channels "
                f"and others of {channels[1]}; give all rows one count, and delete "
                f"{self.folder.address}"
            )

    def _maker(self, unit: int) -> "UnitParts":
        return UnitParts(self, unit)

    @cached_property
    def tokenizer(self) -> Any:
        return text.read_tokenizer(self.ref)

    @property
    def shape_of_text(self) -> dict[str, int] | None:
        """The sizes that a model of text is built for, which are known before; None of series."""
        if not self.ref.tokenizer:
            return None
        return {"channels": 2, "classes": len(self.tokens), "steps": self.ref.window}

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the tokeniser by their numbers."""
        return text.tokens_of(self.tokenizer)


class UnitParts:
    """The parts of one unit, and what its record says."""

    def __init__(self, work: Work, unit: int):
        self.work = work
        self.unit = unit
        self.rows = 0
        self.cut = 0
        self.kinds: dict[str, set[str]] = {"label": set(), "group": set()}
        self.unfit: list[Unfit] = []
        self.parts: list[dict[str, Any]] = []  # that are written
        self.series = SeriesParts(work.ref)
        self.texts = None
        if work.ref.tokenizer:
            window = work.ref.window
            self.texts = TextParts(len(work.tokens), window, unit, whole=work.is_whole)

    def add_block(self, block: Block, name: str, kind: str | None) -> None:
        """Add some rows of series, whose labels are of one kind."""
        self.rows += len(block)
        self.unfit += [row._replace(place=row.place or name) for row in block.unfit]
        if kind:
            self.kinds["label"].add(kind)
        if block.group:
            self.kinds["group"] |= {key[1] for key in block.group.values}
        self._write(self.series.add(block, name))

    def add_records(self, records: Sequence[dict[str, Any]], name: str, first: int) -> None:
        """Add some records of texts; the first has the number `first`."""
        assert self.texts is not None
        work = self.work
        self.rows += len(records)
        splits = text.split_names([record["split"] for record in records], name, work.ref)
        text.check_texts(records, name, first)
        keys = text.group_keys(record.get("group") for record in records)
        self.kinds["group"] |= {key[1] for key in keys if key}
        groups = [MISSING if key is None else group_number(key) for key in keys]
        found = text.documents(records, groups, work.tokenizer, work.ref, first)
        for split, document in zip(splits, found, strict=True):
            if isinstance(document, Document):
                self.cut += work.is_whole and len(document.tokens) - 1 > work.ref.window
                self._write(self.texts.add(split, document))
            else:
                self.unfit.append(document._replace(place=name))

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the last parts and then the record, which is given back as it is now."""
        self._write((self.texts or self.series).rest())
        told = {
            "rows": self.rows,
            "cut": int(self.cut),
            "unfit": [list(row) for row in self.unfit],
            "kinds": {key: sorted(kinds) for key, kinds in self.kinds.items()},
        }
        return self.work.folder.commit(self.unit, told | facts, self.parts)

    def _write(self, parts: Iterable[PartTable]) -> None:
        for part in parts:
            written = self.work.folder.write(self.unit, len(self.parts), part)
            self.parts.append(written)


def _records(columns: Mapping[str, pa.Array]) -> list[dict[str, Any]]:
    """Rows as dicts by key."""
    values = [column.to_pylist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _of_split(records: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [part for record in records for part in record["parts"] if part["split"] == split]


def _contents(record: dict[str, Any]) -> list[Any]:
    """What a record says of its rows, however they are compressed."""
    parts = [[part["split"], part["content"]] for part in record["parts"]]
    return [record["first"], record["last"], parts]


def _kind_of_column(kind: pa.DataType) -> str | None:
    """What the labels of a column are; None where it has none."""
    kind = plain_type(kind)
    if pa.types.is_null(kind):
        return None
    if pa.types.is_boolean(kind):
        return "truth value"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return "text" if is_text or pa.types.is_binary(kind) else "number"


def _kind_of_labels(found: Iterable[Any]) -> str | None:
    """What some labels are, which are of one kind; None where all are missing."""
    names = {str: "text", bool: "truth value", int: "number"}
    values = (labels.plain(value) for value in found)
    return next((names[type(value)] for value in values if value is not None), None)


def _size_of(row: Mapping[str, Any]) -> int:
    """The bytes of a row's values, about."""
    size = 0
    for value in row.values():
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, list | tuple) and len(value):
            width = len(value[0]) if isinstance(value[0], list | tuple) else 1
            size += 4 * len(value) * width
        else:
            size += getattr(value, "nbytes", 8)
    return size
