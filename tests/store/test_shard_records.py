"""Records as columns are the records that they were made of, and a manifest has the same bytes."""

import json

import pytest

from raykd.files.atomic import to_json, write_bytes
from raykd.files.digests import digest_of
from raykd.files.open import open_place
from raykd.store import shard_records
from raykd.store.commit import Shard, StoreWriter, store_id
from raykd.store.manifest import read_manifest
from raykd.store.shard_records import ShardRecords, file_of

# the manifest of a store of two shards, as it was written when records were plain tables
IDENTITY = {"schema": 1, "teacher": "aaaa"}
STORE_ID = "1077d971b1b6eed9"
DIGEST = "807d0e44501f1521d0e27f3abba19575ce34972a5aaa8929019b69d567413f48"
EARLIER = """{
  "bytes": 198,
  "identity": {
    "schema": 1,
    "teacher": "aaaa"
  },
  "schema": 1,
  "sha256": "807d0e44501f1521d0e27f3abba19575ce34972a5aaa8929019b69d567413f48",
  "shards": [
    {
      "bytes": 99,
      "file": "data/part-00000-0000000000000000.parquet",
      "first": 0,
      "last": 8,
      "number": 0,
      "rows": 8,
      "sha256": "0000000000000000000000000000000000000000000000000000000000000000",
      "split": "train"
    },
    {
      "bytes": 99,
      "file": "data/part-00001-0000000000000000.parquet",
      "first": 8,
      "last": 16,
      "number": 1,
      "rows": 8,
      "sha256": "0000000000000000000000000000000000000000000000000000000000000001",
      "split": "val"
    }
  ],
  "statistics": {
    "b": 0.5
  },
  "store_id": "1077d971b1b6eed9"
}
"""


def record(number: int, split: str = "train") -> dict[str, object]:
    sha256 = f"{number:064x}"
    told = {"number": number, "split": split, "first": number * 8, "last": number * 8 + 8}
    return told | {"file": file_of(number, sha256), "bytes": 99, "rows": 8, "sha256": sha256}


ODD = record(3) | {"more": 1}
LISTS = {
    "none": [],
    "usual": [record(0), record(1), record(100_000, "val")],
    "another split's name": [record(0, 'a"\\\n'), record(1, "träin")],
    "one of another form": [record(0), ODD, record(1, "val")],
    "no records": ["x", None, {"number": -1}],
}


@pytest.mark.parametrize("records", LISTS.values(), ids=LISTS)
def test_a_manifest_is_written_digested_and_read_as_plain_json_is(records):
    body = {"schema": 1, "identity": {"a": [1]}, "shards": records, "statistics": {"b": 0.5}}
    columns = body | {"shards": ShardRecords(records)}
    assert list(columns["shards"]) == records
    assert columns["shards"] == records
    assert shard_records.text_of(columns) == to_json(body)
    assert shard_records.digest_of_manifest(columns) == digest_of(body)
    for data in (to_json(body), json.dumps(body).encode()):
        read = shard_records.manifest_of(data, "m")
        assert isinstance(read["shards"], ShardRecords)
        assert read == columns


def test_places_and_slices_are_those_of_a_list():
    records = LISTS["one of another form"]
    columns = ShardRecords(records)
    assert [columns[0], columns[-1], columns[1:]] == [records[0], records[-1], records[1:]]
    with pytest.raises(IndexError):
        columns[3]
    assert columns.total_bytes() == 3 * 99
    assert columns != ShardRecords(records[:2])


def test_an_earlier_manifest_is_read_and_written_again_to_the_byte(tmp_path):
    records = [record(0), record(1, "val")]
    where = tmp_path / STORE_ID
    assert store_id(IDENTITY) == STORE_ID
    write_bytes(where / "_MANIFEST.json", EARLIER.encode())
    found = read_manifest(open_place(where))
    assert found["sha256"] == DIGEST
    assert list(found["shards"]) == records
    again = tmp_path / "again" / STORE_ID
    writer = StoreWriter(again, IDENTITY)
    for told in records:
        write_bytes(again / f"_commits/{told['number']:05d}.json", to_json(told))
    shards = [Shard(0, "train", 0, 8), Shard(1, "val", 8, 16)]
    assert writer.finish(shards, {"b": 0.5}) == found
    assert (again / "_MANIFEST.json").read_text() == EARLIER
