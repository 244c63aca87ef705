"""Scoring of rows that are read in parts: what driver and actors hold, when a first row is scored,
how often the data are hashed, and how fast it goes against a bare loop.

The rows are wide and the teacher is small, so that reading matters. Each run is a process of its
own with a Ray of its own; the bare loop reads the same Parquet in another, before and after it.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from pipelines.bench.stream import together
from raykd import data
from raykd.data import Dataset
from raykd.data.parquet_parts import ParquetParts
from raykd.models.series_encoder import SeriesEncoder
from raykd.orchestration import scoring
from raykd.orchestration.session import connect
from raykd.recipe.recipe import Recipe
from raykd.stages.load import resolve

STEPS = 64
CHANNELS = 64
CLASSES = 4
ROWS = 1024  # of a part, which are 16 MiB
FEW = 64  # rows of validation and of test
TEACHER: dict[str, Any] = {"width": 16, "layers": 1}
BATCH = 64
LOOK_S = 0.2
LISTED_EVERY = 10  # looks: a list of all processes costs more than a look at a few of them


class Scored(NamedTuple):
    """One scoring of a data set."""

    driver_mb: float  # peaks of anonymous memory
    actor_mb: float
    reader_mb: float
    first_s: float  # from opening the source to the first committed shard
    rows_a_s: float  # from the first committed shard to the last
    digests: list[int]  # of all data, by the driver and by an actor


def write(folder: Path, parts: int) -> None:
    """Rows of four classes as Parquet, and a teacher with random weights."""
    (folder / "rows").mkdir(parents=True)
    inputs = pa.list_(pa.list_(pa.float32(), CHANNELS), STEPS)
    schema = pa.schema([("inputs", inputs), ("label", pa.int64())])
    for split, count in (("train", parts), ("val", 1), ("test", 1)):
        path = folder / "rows" / f"{split}.parquet"
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
            for number in range(count):
                rows = ROWS if split == "train" else FEW
                file.write_table(_part(number, rows, schema), row_group_size=rows)
    torch.manual_seed(0)
    teacher = SeriesEncoder(channels=CHANNELS, classes=CLASSES, steps=STEPS, **TEACHER)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")


def _part(number: int, rows: int, schema: pa.Schema) -> pa.Table:
    draw = np.random.default_rng(number)
    label = draw.integers(0, CLASSES, rows)
    inputs = draw.standard_normal((rows, STEPS, CHANNELS), np.float32)
    inputs[:, :, 0] += label[:, None]
    steps = pa.FixedSizeListArray.from_arrays(pa.array(inputs.ravel()), CHANNELS)
    columns = [pa.FixedSizeListArray.from_arrays(steps, STEPS), pa.array(label)]
    return pa.table(columns, schema=schema)


def recipe_of(folder: Path) -> Recipe:
    """One scorer; shards and parts are of as many rows."""
    return resolve(
        {
            "name": "wide",
            "technique": "vanilla",
            "data": {"source": str(folder / "rows")},
            "teacher": {"weights": str(folder / "teacher.safetensors"), "settings": TEACHER},
            "student": {"settings": {"width": 8, "layers": 1}},
            "store": {"rows_per_shard": ROWS, "batch": BATCH, "codec": "dense"},
            "optim": {"order": "blocks"},
            "scale": {"scorers": 1},
        }
    )


@contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """Count how often all data are hashed inside."""
    kept = ParquetParts._digest, Dataset._digest_of

    def counting(work: Any) -> Any:
        def counts(*args: Any) -> Any:
            found.append(1)
            return work(*args)

        return counts

    ParquetParts._digest, Dataset._digest_of = map(counting, kept)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ParquetParts._digest, Dataset._digest_of = kept  # type: ignore[method-assign]


class Counting(scoring.ShardActor):
    """A ShardActor that tells how often it has hashed all data."""

    def __init__(self, *args: Any):
        self.found: list[int] = []
        with counted(self.found):
            super().__init__(*args)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with counted(self.found):
            out = super().__call__(batch)
        return out | {"digests": [len(self.found)] * len(out["rows"])}


class Watch(threading.Thread):
    """The largest anonymous memory of the actors of this process's Ray, and when a first shard is
    committed.
    """

    def __init__(self, out: Path):
        super().__init__(daemon=True)
        self.out = out
        self.began = time.perf_counter()
        self.first_s = 0.0
        self.bytes: dict[str, int] = {Counting.__name__: 0, scoring.ShardRows.__name__: 0}
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        looks = 0
        actors: list[tuple[int, str]] = []
        while not self.ended.wait(LOOK_S):
            if not self.first_s and any(self.out.glob("stores/*/_commits/*.json")):
                self.first_s = time.perf_counter() - self.began
            if looks % LISTED_EVERY == 0:
                actors = self._actors()
            looks += 1
            for pid, name in actors:
                with suppress(OSError, ValueError):  # it has ended
                    self.bytes[name] = max(self.bytes[name], _anonymous(pid))

    def _actors(self) -> list[tuple[int, str]]:
        """(process, class) of each actor of the classes that are watched."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                found += [(process.pid, name) for name in self.bytes if f"({name})" in title]
        return found


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [found] = [line for line in lines if line.startswith("RssAnon")]
    return int(found.split()[1]) * 1024


class Listened(NamedTuple):
    """Results of shards, as they come; what each says of digests is kept."""

    results: Any
    digests: list[int]

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for row in self.results.iter_rows():
            self.digests.append(int(row["digests"]))
            yield row


def _score(folder: Path) -> tuple[Watch, list[int], list[int]]:
    """(what was watched, the driver's digests, those of the actor at each shard)."""
    connect()
    recipe = recipe_of(folder)
    by_driver: list[int] = []
    by_actor: list[int] = []
    results = scoring.shard_results

    def listened(*args: Any) -> Listened:
        return Listened(results(*args, actor=Counting), by_actor)

    watch = Watch(folder / "out")
    scoring.shard_results = listened  # type: ignore[assignment]
    with counted(by_driver):
        source = data.open_source(recipe.data, recipe.optim.order)
        scoring.score(recipe, source, folder / "out")
    scoring.shard_results = results
    watch.ended.set()
    watch.join()
    return watch, by_driver, by_actor


def _told(folder: str) -> dict[str, Any]:
    watch, by_driver, by_actor = _score(Path(folder))
    return {
        "peaks": watch.bytes,
        "first_s": watch.first_s,
        "digests": [len(by_driver), max(by_actor)],
    }


def scored(folder: Path) -> Scored:
    """One scoring of a folder's rows, by a process of its own."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    [told], driver, _ = together((_told, str(folder)))
    committed = sorted(path.stat().st_mtime for path in folder.glob("out/stores/*/_commits/*.json"))
    last = len(committed) - 3  # those of validation and test have few rows
    return Scored(
        driver_mb=driver / 1e6,
        actor_mb=told["peaks"][Counting.__name__] / 1e6,
        reader_mb=told["peaks"][scoring.ShardRows.__name__] / 1e6,
        first_s=told["first_s"],
        rows_a_s=ROWS * last / (committed[last] - committed[0]),
        digests=told["digests"],
    )


@torch.inference_mode()
def _bare(folder: str, parts: int) -> float:
    """Rows a second of a plain pass: a row group, its logits as fp16, one zstd Parquet."""
    here = Path(folder)
    teacher = SeriesEncoder(channels=CHANNELS, classes=CLASSES, steps=STEPS, **TEACHER).eval()
    file = pq.ParquetFile(here / "rows" / "train.parquet")
    writer: pq.ParquetWriter | None = None
    started = time.perf_counter()
    for number in range(parts):
        column = file.read_row_group(number, ["inputs"]).column("inputs").combine_chunks()
        inputs = column.flatten().flatten().to_numpy().reshape(-1, STEPS, CHANNELS)
        rows = torch.from_numpy(inputs.copy())
        z = torch.cat(
            [teacher(rows[i : i + BATCH])["logits"].half() for i in range(0, ROWS, BATCH)]
        )
        flat = z.flatten(1).numpy()
        logits = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        table = pa.table({"row_id": np.arange(len(flat)), "logits": logits})
        writer = writer or pq.ParquetWriter(here / "bare.parquet", table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()
    return parts * ROWS / (time.perf_counter() - started)


def bare(folder: Path, parts: int) -> float:
    """The same, by a process of its own."""
    [rate], _, _ = together((_bare, str(folder), parts))
    return rate


def measure(small: int, folder: Path) -> dict[str, Any]:
    """The figures of scoring so many parts, and 16 times as many."""
    found = []
    rates = []
    for parts in (small, 16 * small):
        here = folder / f"{parts} parts"
        write(here, parts)
        before = bare(here, parts)
        found.append(scored(here))
        after = bare(here, parts)
        print(f"{parts} parts of {ROWS} rows: {json.dumps(found[-1]._asdict())}")
        print(f"a bare loop: {before:.0f} rows/s before, {after:.0f} rows/s after")
        rates.append((before + after) / 2)
        shutil.rmtree(here)
    one, many = found
    return {
        "driver_peak_ratio": many.driver_mb / one.driver_mb,
        "scorer_peak_ratio": many.actor_mb / one.actor_mb,
        "reader_peak_ratio": many.reader_mb / one.reader_mb,
        "start_seconds_ratio": many.first_s / one.first_s,
        "digests_per_process": many.digests[0],
        "digests_per_actor": many.digests[1],
        "score_ratio": many.rows_a_s / rates[1],
    }
