"""A teacher's answers through a codec into Parquet bytes and back, as the store has them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bench import rivals
from raykd.store.codecs import Comb, Dense, TopK
from raykd.store.commit import to_parquet
from raykd.targets import SparseTargets

# rows
BATCH = 16
SHARD = 64


class Encoding(NamedTuple):
    """A codec by its name in tables; `family` and `points` separate the curves of a plot."""

    family: str
    codec: Any
    points: int = 0

    @property
    def name(self) -> str:
        return f"{self.family} {self.points}" if self.points else self.family


@dataclass(frozen=True)
class Stored:
    """What an encoding leaves: bytes of its column chunk a token, for each shard, and the targets
    read back.
    """

    bytes_per_token: NDArray[np.float64]
    targets: SparseTargets | Tensor  # of every token in turn


def combs(vocab: int, points: Sequence[int]) -> list[Encoding]:
    return [Encoding("comb", Comb(vocab, points=n), n) for n in points]


def draws(vocab: int, points: Sequence[int]) -> list[Encoding]:
    return [Encoding("RS-KD", rivals.RandomSampling(vocab, n), n) for n in points]


def others(vocab: int) -> list[Encoding]:
    """Truncations: raykd's own, plain top-50, and DistillKit's two published settings."""
    return [
        Encoding("top-50 renormalised", rivals.Renormalised(vocab, k=50)),
        Encoding("top-50 + tail mass", TopK(vocab, k=50)),
        Encoding("DistillKit 128/16", rivals.recommended(vocab)),
        Encoding("DistillKit 50/1", rivals.budget(vocab)),
    ]


def full(vocab: int) -> Encoding:
    return Encoding("full fp16", Dense(vocab))


def stored(encoding: Encoding, logits: Tensor, *, factor: float = 1.0, key: int = 1) -> Stored:
    """What is left of softmax(factor z), z = `logits` (R, T, V), in shards of SHARD rows."""
    sizes = []
    parts = []
    for first in range(0, len(logits), SHARD):
        table, laid_out = shard(encoding.codec, logits[first : first + SHARD], first, factor, key)
        data = to_parquet(table)
        steps = table["steps"].to_numpy()
        sizes.append(
            (chunk_bytes(data) + 4 / 3 * len(laid_out)) / steps.sum()
        )  # metadata is base64 in the file
        column = pq.read_table(io.BytesIO(data))["logits"]
        parts.append(encoding.codec.decode(column, steps, 1.0, laid_out))
    return Stored(np.array(sizes), joined(parts))


def shard(codec: Any, logits: Tensor, first: int, factor: float, key: int) -> tuple[pa.Table, Any]:
    """A shard's table of all steps of `logits` (R, T, V), and the layout its codec chose."""
    columns = []
    for i in range(0, len(logits), BATCH):
        z = logits[i : i + BATCH].float() * factor
        columns.append(
            codec.encode(
                z, torch.ones(z.shape[:2], dtype=torch.bool), first + i + np.arange(len(z)), key
            )
        )
    steps = np.full(len(logits), logits.shape[1], np.int32)
    packed, laid_out = codec.pack(pa.concat_arrays(columns), steps)
    return pa.table(
        {"row_id": first + np.arange(len(logits)), "steps": steps, "logits": packed}
    ), laid_out


def chunk_bytes(data: bytes) -> int:
    """Bytes of the logits column's chunks in a Parquet file."""
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return sum(
        c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] == "logits"
    )


def joined(parts: Sequence[SparseTargets | Tensor]) -> SparseTargets | Tensor:
    """The targets of all shards in turn."""
    if isinstance(parts[0], Tensor):
        return torch.cat([p for p in parts if isinstance(p, Tensor)])
    sparse = [p for p in parts if isinstance(p, SparseTargets)]
    shift = np.cumsum([0] + [len(p.ids) for p in sparse])
    start = torch.cat(
        [p.start[:-1] + int(s) for p, s in zip(sparse, shift, strict=False)]
        + [torch.tensor(shift[-1:])]
    )
    ids = torch.cat([p.ids for p in sparse])
    weight = torch.cat([p.weight for p in sparse])
    tail = (
        torch.cat([p.tail for p in sparse if p.tail is not None])
        if sparse[0].tail is not None
        else None
    )
    return replace(sparse[0], ids=ids, start=start, weight=weight, tail=tail, entropy=None)
