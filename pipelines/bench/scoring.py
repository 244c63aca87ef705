"""A scored row: raykd's actor under Ray Data, and a bare loop that takes turns with it."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipelines.bench.table import Clock
from raykd import data
from raykd.data.table import Held
from raykd.files.atomic import put_once
from raykd.orchestration import scoring
from raykd.recipe.recipe import Recipe
from raykd.signals import Signals
from raykd.store.commit import Shard, StoreWriter, plan_shards, record_of, to_parquet
from raykd.teacher.scorer import Header, Scorer

SHARDS_A_ROUND = 4
ROUNDS = 15


class Paired(scoring.ShardActor):
    """A ShardActor that, after each round of shards, scores their rows once more by a bare loop,
    into one file.
    """

    def __init__(self, recipe: Recipe, header: Header, folder: str, wanted: dict[str, Any]):
        super().__init__(recipe, header, folder, wanted)
        self.size = recipe.store.batch
        self.bare_path = Path(folder) / "bare.parquet"
        self.bare_file: pq.ParquetWriter | None = None
        self.round: list[dict[str, Any]] = []
        self.warm = False
        self.gap = 0.0
        self.idle = 0.0
        self.clock = Clock()
        self.pause = Clock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        cpu, wall = self.pause.read()
        self.gap = self.gap + wall
        self.idle = self.idle + max(wall - cpu, 0.0)
        out = super().__call__(batch)
        self.round.append(batch)
        spent = [np.nan] * 6
        if not self.warm or len(self.round) == SHARDS_A_ROUND:
            raykd = self.clock.read()
            bare = self.bare()
            if self.warm:
                spent = [*raykd, *bare, self.gap, self.idle]
            self.warm = True
            self.gap = 0.0
            self.idle = 0.0
            self.round = []
        self.pause.read()
        return out | {"spent": np.array([spent])}

    @torch.inference_mode()
    def bare(self) -> tuple[float, float]:
        """CPU and wall seconds of a plain pass over the round's rows."""
        for block in self.round:
            parts = []
            for i in range(0, len(block["row_id"]), self.size):
                x = torch.from_numpy(block["inputs"][i : i + self.size])
                parts.append(self.scorer.teacher.module(x)["logits"].half())
            z = torch.cat(parts).flatten(1).numpy()
            logits = pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), z.shape[1])
            table = pa.table({"row_id": block["row_id"], "logits": logits})
            self.bare_file = self.bare_file or pq.ParquetWriter(
                self.bare_path, table.schema, compression="zstd"
            )
            self.bare_file.write_table(table)
        return self.clock.read()


def run(recipe: Recipe, folder: Path) -> NDArray[np.float64]:
    """(rounds, 6):

    CPU and wall seconds of raykd and of the bare loop; raykd's wall between shards, idle part of
    it.
    """
    dataset = data.load(recipe.data)
    _, wanted = scoring.locate(recipe, dataset, folder)
    writer = StoreWriter(folder / "paired", wanted)
    shards = plan_shards({"train": len(dataset.splits["train"])}, recipe.store.rows_per_shard)
    taken = shards[: 1 + SHARDS_A_ROUND * ROUNDS]
    results = scoring.shard_results(recipe, Held(dataset), writer, taken, Paired)
    spent = np.stack([row["spent"] for row in results.iter_rows()])
    return spent[np.isfinite(spent).all(1)]


def parts(recipe: Recipe, folder: Path, times: int = 9) -> dict[str, float]:
    """Median CPU seconds of each part of one shard's scoring."""
    dataset = data.load(recipe.data)
    scorer = Scorer(recipe, Header.of(recipe, dataset))
    fresh = itertools.count()
    shard = Shard(0, "train", 0, recipe.store.rows_per_shard)
    size = recipe.store.batch
    rows = dataset.splits["train"].take(slice(shard.first, shard.last))
    batches = [rows.take(slice(i, i + size)) for i in range(0, len(rows), size)]
    table = scorer.table(rows)
    content = to_parquet(table)

    def forward() -> list[Signals]:
        return [
            scorer.teacher(torch.from_numpy(b.inputs), torch.from_numpy(b.mask)) for b in batches
        ]

    def write() -> None:
        number = next(fresh)
        put_once(folder / f"{number}.parquet", content)
        put_once(folder / f"{number}.json", b"{}")

    with torch.inference_mode():
        signals = forward()
        acts: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "valence signals": lambda: [
                scorer._valence(b, s) for b, s in zip(batches, signals, strict=True)
            ],
            "codec": lambda: [
                scorer.codec.encode(s.logits, s.mask, b.row_id, scorer.header.key)
                for b, s in zip(batches, signals, strict=True)
            ],
            "Parquet": lambda: to_parquet(table),
            "sha256": lambda: record_of(shard, content),
            "write, fsync": write,
        }
        spent = np.median([[_cost(act) for act in acts.values()] for _ in range(times)], axis=0)
    return dict(zip(acts, spent.tolist(), strict=True))


def _cost(act: Callable[[], Any]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started
