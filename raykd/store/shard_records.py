"""The records of a store's shards, and its manifest: a million take tens of megabytes.

As tables of Python's they take some 750 bytes each, and a manifest is read and written several
times over. Here they are columns, and the manifest's text is made and taken apart record by record.
"""

import hashlib
import io
import json
import re
import secrets
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from raykd.files.atomic import from_json

MOST = 1 << 62  # that a column holds
ORDER = ("number", "split", "first", "last", "bytes", "rows", "sha256")
KEYS = {*ORDER, "file"}
SHA_BYTES = 32
NO_SHA = "0" * 2 * SHA_BYTES
SHA = re.compile(r"[0-9a-f]{64}")
NUMBER = rb"0|[1-9][0-9]{0,17}"
TEXT = rb"[ !#-\[\]-~]*"  # that JSON writes as it is
# a record in a manifest, as `text_of` writes it
WRITTEN = re.compile(
    rb'    \{\n      "bytes": (?P<size>%(number)s),\n      "file": "(?P<file>%(text)s)",\n'
    rb'      "first": (?P<first>%(number)s),\n      "last": (?P<last>%(number)s),\n'
    rb'      "number": (?P<number>%(number)s),\n      "rows": (?P<rows>%(number)s),\n'
    rb'      "sha256": "(?P<sha256>[0-9a-f]{64})",\n      "split": "(?P<split>%(text)s)"\n    \}'
    % {b"number": NUMBER, b"text": TEXT}
)
BEGINS = b'\n  "shards": [\n'
ENDS = b"\n  ]"
COMPACT = (
    '{"bytes":%d,"file":"%s","first":%d,"last":%d,"number":%d,"rows":%d,"sha256":"%s","split":%s}'
)
INDENTED = (
    '    {\n      "bytes": %d,\n      "file": "%s",\n      "first": %d,\n      "last": %d,\n'
    '      "number": %d,\n      "rows": %d,\n      "sha256": "%s",\n      "split": %s\n    }'
)


class ShardRecords(Sequence[dict[str, Any]]):
    """The records in their order, as columns. Whatever is none of the usual form is kept as it is.

    Each is made anew where it is asked for, so changing one changes nothing here.
    """

    def __init__(self, records: Iterable[Any] = ()):
        self._number = array("q")
        self._first = array("q")
        self._last = array("q")
        self._bytes = array("q")
        self._rows = array("q")
        self._split = array("q")  # number of the name
        self._sha256 = bytearray()
        self._splits: dict[str, int] = {}
        self.others: dict[int, Any] = {}
        for record in records:
            self.append(record)

    def append(self, record: Any) -> None:
        if is_usual(record):
            self.add_usual(record)
        else:
            self.others[len(self)] = record
            self.add(0, "", 0, 0, 0, 0, NO_SHA)

    def add(
        self, number: int, split: str, first: int, last: int, size: int, rows: int, sha256: str
    ) -> None:
        """Append a record that is known to be of the usual form."""
        self._number.append(number)
        self._first.append(first)
        self._last.append(last)
        self._bytes.append(size)
        self._rows.append(rows)
        self._split.append(self._splits.setdefault(split, len(self._splits)))
        self._sha256 += bytes.fromhex(sha256)

    def add_usual(self, record: dict[str, Any]) -> None:
        """Append a record that `is_usual` has found so."""
        self.add(*map(record.__getitem__, ORDER))

    def add_from(self, others: "ShardRecords", place: int) -> None:
        """Append a record of others, which is of the usual form."""
        self._number.append(others._number[place])
        self._first.append(others._first[place])
        self._last.append(others._last[place])
        self._bytes.append(others._bytes[place])
        self._rows.append(others._rows[place])
        split = list(others._splits)[others._split[place]]
        self._split.append(self._splits.setdefault(split, len(self._splits)))
        self._sha256 += others._sha256[place * SHA_BYTES : (place + 1) * SHA_BYTES]

    def numbers(self) -> Sequence[int]:
        """The number of each."""
        return self._number

    def __len__(self) -> int:
        return len(self._number)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> Any:
        places = range(len(self))[place]
        if isinstance(places, range):
            return list(self._records(places))
        return next(self._records(range(places, places + 1)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._records(range(len(self)))

    def _records(self, places: range) -> Iterator[Any]:
        splits = list(self._splits)
        for place in places:
            if place in self.others:
                yield self.others[place]
                continue
            number = self._number[place]
            sha256 = self._sha256[place * SHA_BYTES : (place + 1) * SHA_BYTES].hex()
            yield {
                "number": number,
                "split": splits[self._split[place]],
                "first": self._first[place],
                "last": self._last[place],
                "file": file_of(number, sha256),
                "bytes": self._bytes[place],
                "rows": self._rows[place],
                "sha256": sha256,
            }

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardRecords):  # splits are numbered as they come: alike where equal
            return vars(self) == vars(other)
        if not isinstance(other, list) or len(self) != len(other):
            return False
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def total_bytes(self) -> int:
        """The bytes of all files."""
        return sum(self._bytes) + sum(record["bytes"] for record in self.others.values())

    def texts(self, form: str) -> Iterator[str]:
        """Each record as JSON: COMPACT, or INDENTED as in a manifest."""
        quoted = [json.dumps(split) for split in self._splits]
        for place in range(len(self)):
            if place in self.others:
                yield _other_text(self.others[place], form)
                continue
            number = self._number[place]
            sha256 = self._sha256[place * SHA_BYTES : (place + 1) * SHA_BYTES].hex()
            yield form % (
                self._bytes[place],
                file_of(number, sha256),
                self._first[place],
                self._last[place],
                number,
                self._rows[place],
                sha256,
                quoted[self._split[place]],
            )


def file_of(number: int, sha256: str) -> str:
    """The name of the file of a shard."""
    return f"data/part-{number:05d}-{sha256[:16]}.parquet"


def is_usual(record: Any) -> bool:
    """Whether a value is a record as a commit writes it."""
    if not isinstance(record, dict) or record.keys() != KEYS:
        return False
    number = record["number"]
    first = record["first"]
    last = record["last"]
    size = record["bytes"]
    rows = record["rows"]
    return (
        type(number) is type(first) is type(last) is type(size) is type(rows) is int
        and 0 <= number < MOST
        and 0 <= first < MOST
        and 0 <= last < MOST
        and 0 <= size < MOST
        and 0 <= rows < MOST
        and isinstance(record["split"], str)
        and isinstance(record["sha256"], str)
        and SHA.fullmatch(record["sha256"]) is not None
        and record["file"] == file_of(number, record["sha256"])
    )


def _other_text(record: Any, form: str) -> str:
    if form == COMPACT:
        return json.dumps(record, sort_keys=True, separators=(",", ":"))
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    return "\n".join(f"    {line}" for line in text.splitlines())


def digest_of_manifest(body: Mapping[str, Any]) -> str:
    """Hex sha256 of a manifest without its own digest: that of its canonical JSON."""
    found = hashlib.sha256()
    mark = secrets.token_hex(16)
    text = json.dumps({**body, "shards": mark}, sort_keys=True, separators=(",", ":"))
    before, after = text.split(json.dumps(mark))
    found.update(f"{before}[".encode())
    separator = ""
    for record in _records(body).texts(COMPACT):
        found.update(f"{separator}{record}".encode())
        separator = ","
    found.update(f"]{after}".encode())
    return found.hexdigest()


def text_of(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as indented JSON with sorted keys."""
    mark = secrets.token_hex(16)
    whole = {**manifest, "shards": mark}
    text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
    before, after = text.split(json.dumps(mark))
    records = _records(manifest)
    if not records:
        return f"{before}[]{after}\n".encode()
    made = io.BytesIO()
    made.write(f"{before}[".encode())
    separator = "\n"
    for record in records.texts(INDENTED):
        made.write(f"{separator}{record}".encode())
        separator = ",\n"
    made.write(f"\n  ]{after}\n".encode())
    return made.getvalue()


def _records(manifest: Mapping[str, Any]) -> ShardRecords:
    records = manifest["shards"]
    return records if isinstance(records, ShardRecords) else ShardRecords(records)


def manifest_of(data: bytes | None, name: str) -> Any:
    """The value of a manifest's file, its records as ShardRecords; None where there is no file.

    StoreError if it is no JSON. One of another form is read as any JSON, in more memory.
    """
    if data is None:
        return None
    found = _as_written(data)
    if found is None:
        manifest = from_json(data, name)
        if isinstance(manifest, dict) and isinstance(manifest.get("shards"), list):
            manifest["shards"] = ShardRecords(manifest["shards"])
        return manifest
    records, begin, end = found
    manifest = from_json(b'%b\n  "shards": []%b' % (data[:begin], data[end:]), name)
    return {**manifest, "shards": records}


def _as_written(data: bytes) -> tuple[ShardRecords, int, int] | None:
    """(records, begin, end) of the list of shards in a manifest as `text_of` writes it."""
    begin = data.find(BEGINS)
    if begin < 0:
        return None
    place = begin + len(BEGINS)
    records = ShardRecords()
    while found := WRITTEN.match(data, place):
        number = int(found["number"])
        digest = found["sha256"].decode()
        if found["file"].decode() != file_of(number, digest):
            return None
        records.add(
            number,
            found["split"].decode(),
            int(found["first"]),
            int(found["last"]),
            int(found["size"]),
            int(found["rows"]),
            digest,
        )
        place = found.end() + 2
        if data[found.end() : place] != b",\n":
            end = found.end() + len(ENDS)
            is_end = data[found.end() : end] == ENDS
            return (records, begin, end) if is_end else None
    return None
