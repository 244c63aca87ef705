"""What the store costs: writing beside the bare teacher's forward pass, reading beside a student's
step.
"""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.bench.encodings import BATCH, SHARD, shard
from pipelines.bench.language import Language, next_token_loss
from pipelines.bench.table import Clock
from raykd.data import Rows
from raykd.losses.objective import Objective
from raykd.models.adapter import Adapter
from raykd.recipe.tables import Optim, TermSpec
from raykd.signals import Batch
from raykd.store.codecs import Comb
from raykd.store.commit import Shard, StoreWriter, plan_shards, to_parquet
from raykd.store.logits import codec_metadata
from raykd.store.reader import Store
from raykd.training.arm import Arm, World
from raykd.training.device_rows import DeviceRows, to_device
from raykd.training.phases import spans
from raykd.training.state import Learner, State
from raykd.training.step import TrainStep

ROWS = 4  # a step: 512 tokens
LARGE = {"width": 512, "layers": 5, "heads": 8}  # 20 M parameters
SPREAD = 3.35  # of a teacher's Gaussian logits, whose 8192 classes then have 4.9 bits


@torch.inference_mode()
def writing(
    tokens: Tensor, vocab: int, folder: Path, *, rounds: int, rows: int = SHARD
) -> NDArray[np.float64]:
    """(rounds, 4) CPU seconds of a shard: bare forward; forward in turns with encoding; encoding;
    packing and commit.

    The teacher has 20 M random parameters, its logits scaled to the flat teacher's entropy: that is
    what decides how many ids there are to write.
    """
    teacher = Language(vocab, tokens.shape[1], **LARGE).eval()
    codec = Comb(vocab)
    teacher.norm_out.weight.mul_(SPREAD / (0.02 * math.sqrt(LARGE["width"])))
    writer = StoreWriter(folder, {"bench": "writing"})
    steps = np.full(rows, tokens.shape[1], np.int32)
    spent = []
    clock = Clock()
    for number in range(rounds + 1):
        bare = 0.0
        forward = 0.0
        encode = 0.0
        columns = []
        for i in range(0, rows, BATCH):
            x = tokens[i : i + BATCH]
            clock.read()
            teacher(x)
            bare += clock.read()[0]
            z = teacher(x)
            forward += clock.read()[0]
            columns.append(
                codec.encode(z, torch.ones(x.shape, dtype=torch.bool), np.arange(i, i + len(x)), 1)
            )
            encode += clock.read()[0]
        packed, laid_out = codec.pack(pa.concat_arrays(columns), steps)
        table = _described(
            pa.table({"row_id": np.arange(rows), "steps": steps, "logits": packed}), codec, laid_out
        )
        writer.commit(Shard(number, "train", number * rows, (number + 1) * rows), table)
        spent.append((bare, forward, encode, clock.read()[0]))
    return np.array(spent[1:])


def decoding(
    student: Language, tokens: Tensor, logits: Tensor, *, rounds: int
) -> NDArray[np.float64]:
    """(rounds, 3) CPU seconds a token: a shard read from Parquet and decoded; decoded as a node's
    mapped copy has it, which is all that a training step does; a student's step on labels.
    """
    codec = Comb(logits.shape[2])
    clock = Clock()
    rows = logits[:SHARD]
    table, laid_out = shard(codec, rows, 0, 1.0, 1)
    data = to_parquet(table)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, fused=True)
    steps = table["steps"].to_numpy()
    copy = codec.unpack(table["logits"].combine_chunks(), steps, laid_out)
    spent = []
    for number in range(rounds + 1):
        x = tokens[number * ROWS % SHARD :][:ROWS]
        clock.read()
        read = pq.read_table(io.BytesIO(data), page_checksum_verification=True, use_threads=False)
        codec.decode(read["logits"], read["steps"].to_numpy(), 1.0, laid_out)
        decode = clock.read()[0]
        codec.decode(copy, steps, 1.0, "plain")
        mapped = clock.read()[0]
        optimizer.zero_grad()
        next_token_loss(student, x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        places = rows.shape[:2].numel()
        spent.append((decode / places, mapped / places, clock.read()[0] / x[:, 1:].numel()))
    return np.array(spent[1:])


def ingest(
    student: Language, tokens: Tensor, logits: Tensor, folder: Path, *, rounds: int
) -> NDArray[np.float64]:
    """(rounds, 2) CPU seconds of raykd's step: rows ordered, gathered and decoded by its loader;
    one batch held.
    """
    store = StoreWriter(folder, {"bench": "ingest"})
    codec = Comb(logits.shape[2])
    shards = plan_shards({"train": len(logits)}, SHARD)
    for part in shards:
        table, laid_out = shard(codec, logits[part.first : part.last], part.first, 1.0, 1)
        table = _described(table, codec, laid_out)
        for name, kind in (
            ("saliency", pa.float32()),
            ("answer", pa.int32()),
        ):  # a row's, which every store has
            table = table.append_column(name, pa.array(np.zeros(table.num_rows), kind))
        store.commit(part, table)
    store.finish(shards, {})
    count = len(tokens)
    mask = np.ones(tokens.shape, bool)
    labels = np.zeros(count, np.int64)
    rows = Rows(
        np.arange(count),
        tokens.numpy().astype(np.float32)[..., None],
        mask,
        labels,
        np.arange(count),
    )
    device = torch.device("cpu")
    read = to_device(rows, "train", Store(folder), frozenset({"logits"}), device)
    loaded = _step(student, read, TrainStep)
    held = _step(student, read, Held)
    clock = Clock()
    spent = []
    for _ in range(rounds + 1):
        spent.append([_cost(clock, loaded), _cost(clock, held)])
    return np.array(spent[1:])


class Held(TrainStep):
    """A step that meets the same batch every time, its targets decoded once."""

    held: Batch | None = None

    def _batch(self, number: int, seed: int) -> Batch:
        if self.held is None:
            batch = super()._batch(number, seed)
            assert batch.targets is not None
            found = batch.targets(1.0)
            self.held = replace(batch, targets=lambda _temperature: found)
        return self.held


class Reads(nn.Module):
    """A language model that takes its tokens as a series (B, T, 1) of floats."""

    def __init__(self, model: Language):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs[..., 0].long())


def _step(student: Language, rows: DeviceRows, kind: type[TrainStep]) -> TrainStep:
    terms = {"kd": TermSpec.model_validate({"temperature": 1.0})}
    optim = Optim(batch=ROWS, steps=10_000)
    learner = Learner(Adapter(Reads(student)), Objective(terms))
    state = State(learner, torch.optim.AdamW(learner.parameters(), 1e-4, fused=True))
    step = kind(Arm("student", 0, terms), optim, rows, World(), state)
    step.enter(spans((), optim.steps)[0])
    return step


def _cost(clock: Clock, step: Callable[[], Any]) -> float:
    clock.read()
    step()
    return clock.read()[0]


def _described(table: pa.Table, codec: Comb, laid_out: Any) -> pa.Table:
    """The table with what a reader must know of its logits column."""
    field = pa.field(
        "logits", table["logits"].type, nullable=False, metadata=codec_metadata(codec, laid_out)
    )
    return table.set_column(table.schema.get_field_index("logits"), field, table["logits"])
