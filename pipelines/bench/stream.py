"""A store of ten million tokens in the memory of one of a million: written, verified, read and
resumed.

    python -m pipelines.bench.stream

Synthetic answers over 8,192 classes go through the comb of 12 points and the commit protocol in two
processes; two readers then take global batches from the node's mapped copy, as training does,
straight through an epoch and once more from its middle. The peak is that of anonymous memory in any
process: mapped files are shared and can be dropped.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.bench.table import machine
from raykd.data import Rows
from raykd.data.order import shuffled
from raykd.recipe.tables import Optim
from raykd.store import care
from raykd.store.codecs.comb import Comb
from raykd.store.commit import Shard, StoreWriter, plan_shards, store_id
from raykd.store.logits import codec_metadata
from raykd.store.reader import Store
from raykd.training.arm import World
from raykd.training.device_rows import to_device
from raykd.training.prefetch import Ahead

VOCAB = 8192
POINTS = 12
STEPS = 256
ROWS_PER_SHARD = 256
BATCH = 32
PROCESSES = 2
DRAWN = 384  # different rows: drawing ten million tokens is another bench's time
IDENTITY = {"teacher": "made up", "store": {"codec": "comb", "points": POINTS, "vocab": VOCAB}}
SPAWN = multiprocessing.get_context("spawn")


class Peak(threading.Thread):
    """The largest anonymous memory of this process, looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.bytes = 0
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def answers(seed: int) -> torch.Tensor:
    """(STEPS, VOCAB): logits of one made-up sequence, a few classes likely and the rest a long
    tail.
    """
    draw = torch.Generator().manual_seed(seed)
    rank = torch.rand(STEPS, VOCAB, generator=draw).argsort(1).float()
    return -1.5 * (rank + 1).log()


def write(folder: Path, shards: list[Shard]) -> None:
    """Commit these shards.

    Their rows are combs drawn from four sequences of answers, in another order in each.
    """
    codec = Comb(VOCAB, points=POINTS)
    writer = StoreWriter(folder, IDENTITY)
    teacher = [answers(i) for i in range(4)]
    mask = torch.ones(1, STEPS, dtype=torch.bool)
    drawn = [codec.encode(teacher[i % 4][None], mask, np.array([i]), 7) for i in range(DRAWN)]
    pool = pa.concat_arrays(drawn)
    for shard in shards:
        row_id = np.arange(shard.first, shard.last)
        order = np.random.default_rng(shard.number).integers(0, DRAWN, len(row_id))
        steps = np.full(len(row_id), STEPS, np.int32)
        packed, layout = codec.pack(pool.take(pa.array(order)), steps)
        field = pa.field(
            "logits", packed.type, nullable=False, metadata=codec_metadata(codec, layout)
        )
        schema = pa.schema([pa.field("row_id", pa.int64()), pa.field("steps", pa.int32()), field])
        writer.commit(shard, pa.table([pa.array(row_id), pa.array(steps), packed], schema=schema))


def rows_of(folder: Path, count: int) -> Rows:
    """Rows whose inputs and masks are files."""
    inputs = np.load(folder / "inputs.npy", mmap_mode="r")
    mask = np.load(folder / "mask.npy", mmap_mode="r")
    return Rows(np.arange(count), inputs, mask, np.zeros(count, np.int64), np.arange(count))


def make_rows(folder: Path, count: int) -> None:
    inputs = np.lib.format.open_memmap(folder / "inputs.npy", "w+", np.float32, (count, STEPS, 1))
    mask = np.lib.format.open_memmap(folder / "mask.npy", "w+", np.bool_, (count, STEPS))
    for first in range(0, count, 1024):
        last = min(first + 1024, count)
        inputs[first:last] = np.arange(first, last, dtype=np.float32)[:, None, None]
        mask[first:last] = True


def read(folder: Path, store: Path, count: int, rank: int, first: int) -> list[str]:
    """A digest of what each step's batch holds on one of the readers, from step `first` to the
    epoch's end.
    """
    os.environ["RAYKD_CACHE"] = str(folder / "cache")
    kept = to_device(
        rows_of(folder, count), "train", Store(store), frozenset({"logits"}), torch.device("cpu")
    )
    order = shuffled(kept.label.numpy(), Optim(batch=BATCH), seed=0)
    share = World(rank, PROCESSES).share(BATCH)
    last = count // BATCH

    def make(number: int) -> Any:
        batch = kept.batch(torch.from_numpy(order.rows(number)[share]))
        assert batch.targets is not None
        batch.targets(1.0)
        return batch

    ahead = Ahead(make, last)
    digests = []
    for number in range(first, last):
        batch = ahead(number)
        targets = batch.targets(1.0)
        assert torch.equal(batch.inputs[:, 0, 0].long(), batch.row_id)
        parts = (batch.row_id, targets.ids, targets.weight)
        digests.append(
            hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        )
    ahead.close()
    return digests


def _measured(queue: Any, number: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    peak = Peak()
    found = work(*args)
    peak.ended.set()
    peak.join()
    queue.put((number, found, max(peak.bytes, anonymous())))


def together(*jobs: tuple[Any, ...]) -> tuple[list[Any], int, float]:
    """(what each (work, *args) gives, the largest peak in bytes, wall seconds), each in a process
    of its own.
    """
    queue = SPAWN.Queue()
    started = time.perf_counter()
    processes = [
        SPAWN.Process(target=_measured, args=(queue, i, work, args), daemon=True)
        for i, (work, *args) in enumerate(jobs)
    ]
    for process in processes:
        process.start()
    found: list[Any] = []
    while len(found) < len(jobs):
        assert all(process.exitcode in (None, 0) for process in processes), "a process died"
        with suppress(Empty):
            found.append(queue.get(timeout=1))
    found.sort(key=lambda f: f[0])
    for process in processes:
        process.join()
    return [f[1] for f in found], max(f[2] for f in found), time.perf_counter() - started


def run(tokens: int) -> dict[str, dict[str, float]]:
    """{phase: {"peak_mb", "seconds"}} of a store of so many tokens."""
    count = tokens // STEPS // BATCH * BATCH
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_rows(folder, count)
        store = folder / store_id(IDENTITY)
        shards = plan_shards({"train": count}, ROWS_PER_SHARD)
        phases = {
            "write": together(*((write, store, shards[i::PROCESSES]) for i in range(PROCESSES)))
        }
        manifest = StoreWriter(store, IDENTITY).finish(shards, {})
        phases["verify"] = together((care.verify, store))
        assert phases["verify"][0][0]["complete"]
        middle = count // BATCH // 2
        phases["read"] = together(
            *((read, folder, store, count, rank, 0) for rank in range(PROCESSES))
        )
        phases["resume"] = together(
            *((read, folder, store, count, rank, middle) for rank in range(PROCESSES))
        )
        for straight, resumed in zip(phases["read"][0], phases["resume"][0], strict=True):
            assert straight[middle:] == resumed, "resumed in mid-epoch, a reader sees other batches"
    print(
        f"{tokens:,} tokens: {count} rows, {len(shards)} shards, "
        f"{manifest['bytes'] / count / STEPS:.2f} bytes a token"
    )
    return {
        name: {"peak_mb": peak / 1e6, "seconds": seconds}
        for name, (_, peak, seconds) in phases.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a hundredth of the tokens")
    scale = 100 if parser.parse_args().smoke else 1
    print(machine())
    small, large = (run(tokens // scale) for tokens in (1_000_000, 10_000_000))
    for name in small:
        print(
            f"{name:<8}",
            *(
                f"{r[name]['peak_mb']:8.1f} MB anonymous {r[name]['seconds']:7.1f} s"
                for r in (small, large)
            ),
        )
    peaks = [max(phase["peak_mb"] for phase in found.values()) for found in (small, large)]
    print(f"peaks: {peaks[0]:.1f} MB at 1 M tokens, {peaks[1]:.1f} MB at 10 M")
    seconds = sum(phase["seconds"] for phase in large.values())
    figures = {
        "peak_mb_1m": peaks[0],
        "peak_mb_10m": peaks[1],
        "ratio": peaks[1] / peaks[0],
        "seconds_10m": seconds,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
