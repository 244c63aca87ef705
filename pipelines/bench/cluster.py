"""What a cluster costs, and what it outlives. So far: a store of a million shards.

    python -m pipelines.bench.cluster [--shards N]

The driver's part of a store of N shards is simulated. It is resumed with half of them committed (a
listing, the record of each read, its file's size compared), committed with all (the other records
read, the manifest made and written) and opened (read, its digest made again, every size compared).
The place is a bucket in this process that answers at once, so that seconds are raykd's own, and a
real one's requests come on top. MiB are the greatest memory of the process, all modules and the
place's copy of the manifest included.

The last line is a JSON object. What is not measured yet is null, and named on stderr; for nodes
that are killed see `lost_node`.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipelines.bench.table import machine
from raykd.files.place import Listed, Record, holds
from raykd.store.commit import Shard, StoreWriter, plan_shards, store_id
from raykd.store.reader import Store
from raykd.store.shard_records import file_of

SHARDS = 1_000_000
ROWS = 1024
SIZE = 16 << 20
MOST_SECONDS = 60
MOST_MIB = 1024
NOT_YET = (
    "runs_without_shared_disk",
    "node_kills_scoring",
    "node_kills_training",
    "manifests_equal",
    "weights_max_difference",
    "median_seconds_lost_per_kill",
    "joined_node_used_s",
    "stalled_rank_named_s",
    "sigterm_steps_lost",
    "trials_paid_twice",
    "cpu_per_row_ratio",
)


class Simulated:
    """A bucket with the records and files of all shards, made as they are asked for."""

    address = "s3://simulated/stores"
    is_near = False

    def __init__(self, shards: int, identity: dict[str, Any]):
        self.shards = shards // 2  # that scorers have committed
        self.name = store_id(identity)
        self.kept: dict[str, bytes] = {}

    def __str__(self) -> str:
        return f"{self.address}/{self.name}"

    def below(self, name: str) -> "Simulated":
        raise NotImplementedError("this store has no layers")

    def put_once(self, name: str, data: bytes) -> bool:
        is_new = name not in self.kept
        self.kept.setdefault(name, data)
        return is_new

    def put(self, name: str, data: bytes) -> None:
        self.kept[name] = data

    def get(self, name: str, *, last: int | None = None) -> bytes | None:
        if name.startswith("_commits/"):
            return json.dumps(self.record(int(name[9:-5]))).encode()
        return self.kept.get(name)

    def delete(self, name: str) -> None:
        raise AssertionError(f"{name} is sound, and was removed")

    def listed(self, below: str = "") -> dict[str, Listed]:
        if below == "_commits":
            names = (f"_commits/{number:05d}.json" for number in range(self.shards))
            return {name: Listed(300, 0.0, name[-16:]) for name in names}
        return {name: Listed(SIZE, 0.0, name[-16:]) for name in self._files()}

    def _files(self) -> Iterator[str]:
        return (file_of(number, self.digest(number)) for number in range(self.shards))

    def folders(self, below: str = "") -> list[str]:
        return []

    def lacking(self, records: Iterable[Record]) -> Iterator[Record]:
        """As a bucket does it."""
        sizes = dict.fromkeys(self._files(), SIZE)
        return (record for record in records if sizes.get(record["file"]) != record["bytes"])

    @staticmethod
    def digest(number: int) -> str:
        return f"{number:016x}" * 4

    @classmethod
    def record(cls, number: int) -> dict[str, Any]:
        sha256 = cls.digest(number)
        first = number * ROWS
        shard = {"number": number, "split": "train", "first": first, "last": first + ROWS}
        return shard | {
            "file": file_of(number, sha256),
            "bytes": SIZE,
            "rows": ROWS,
            "sha256": sha256,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=SHARDS, help="of the simulated store")
    count = parser.parse_args().shards
    print(f"{machine()}, {count:,} shards", flush=True)
    seconds, mib = manifest_cost(count)
    print(f"not measured yet: {', '.join(NOT_YET)}", file=sys.stderr)
    print(
        json.dumps(
            dict.fromkeys(NOT_YET) | {"manifest_1e6_seconds": seconds, "manifest_1e6_mib": mib}
        )
    )
    if seconds > MOST_SECONDS or mib > MOST_MIB:
        sys.exit(f"more than {MOST_SECONDS} s or {MOST_MIB} MiB")


def manifest_cost(count: int) -> tuple[float, float]:
    """(CPU seconds, MiB at the peak) of the driver's work on a store of so many shards."""
    identity = {"schema": 1, "teacher": "simulated"}
    place = Simulated(count, identity)
    spent = written(place, identity, count)
    spent += timed("open", lambda: open_again(place, count))  # as another command does it
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(spent, 1), round(peak)


def written(place: Simulated, identity: dict[str, Any], count: int) -> float:
    """The CPU seconds of resuming a store and of committing it."""
    shards = plan_shards({"train": [ROWS] * count}, ROWS)
    writer = StoreWriter(place, identity)
    half = shards[count // 2 :]
    resumed = timed("resume", lambda: expect(writer.missing(shards) == half))
    return resumed + timed("commit", lambda: commit(place, writer, shards))


def commit(place: Simulated, writer: StoreWriter, shards: list[Shard]) -> None:
    place.shards = len(shards)
    writer.finish(shards, {"tokens": 0})


def open_again(place: Simulated, count: int) -> None:
    store = Store(place)
    expect(len(store.manifest["shards"]) == count)
    expect(holds(place, store.manifest["shards"]))


def expect(is_so: bool) -> None:
    if not is_so:
        sys.exit("the store is not what was committed")


def timed(name: str, work: Callable[[], None]) -> float:
    """The CPU seconds of some work, which are told."""
    begun = time.process_time()
    work()
    spent = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name}: {spent:.1f} s of CPU, {peak:,.0f} MiB at the most until now", flush=True)
    return spent


if __name__ == "__main__":
    main()
