"""The log of drafts: what a student drafted and its teacher answered, as a store to train on again.

A row is a draft that the teacher verified. Its columns:

    row_id      int64             the draft's number: by interval, place in the batch, group
    row         int64             the data's row that it continues
    drawn       int32             the group it was drafted in, named by the first step that used it
    text        int32 a token     prompt and draft, from the last start of a document on
    text_steps  int32             tokens of the text
    steps       int32             tokens of the draft, which end the text
    log_q       fp16 a step       the student's log probability of each, when it was drawn
    accepted    int32             how many of them stayed
    correction  int32             the teacher's token for the first that did not; -1: all stayed
    logits      by a codec        the teacher's, a step for each drafted token

The files are those of every store (raykd/store/commit.py). A shard is one place of the global batch
over an interval between two reports. So any number of workers writes the same shards, up to what
the order of sums does to weights, and a training resumed at a report writes none twice.
`raykd/generation/replay.py` reads the log.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.data.vocabulary import table_digest
from raykd.errors import RecipeError
from raykd.files.address import Address
from raykd.files.digests import digest_of
from raykd.signals import Batch
from raykd.store import columns as codec
from raykd.store.codecs import Codec
from raykd.store.commit import SCHEMA, Shard, StoreWriter
from raykd.store.logits import codec_for, codec_metadata

SPLIT = "train"
NONE = -1  # no correction: every drafted token stayed
CODECS = ("dense", "comb", "topk")  # that keep answers by themselves


@dataclass(frozen=True)
class DraftLogSpec:
    """Where a training keeps its drafts, and everything that their log depends on."""

    where: Address
    identity: dict[str, Any]

    @property
    def codec(self) -> Codec:
        """How the teacher's answers are stored."""
        return codec_for(self.identity["store"], self.identity["vocabulary"]["size"])


def draft_log_spec(
    where: Address, run: str, classes: Sequence[str], temperature: float, store: dict[str, Any]
) -> DraftLogSpec:
    """The log of a training named `run`, its answers kept by the codec of `store`.

    `store` is the recipe's table. RecipeError for a codec that keeps no answers by themselves.
    """
    if store["codec"] not in CODECS:
        raise RecipeError(
            f'source.keep: store.codec = "{store["codec"]}" keeps no answers; '
            'use "comb", "topk" or "dense"'
        )
    stored = {key: value for key, value in store.items() if key not in ("rows_per_shard", "batch")}
    if "temperatures" in store:
        stored["temperatures"] = sorted({temperature, 1.0})
    identity = {
        "schema": SCHEMA,
        "drafts": {"run": run, "temperature": temperature},
        "vocabulary": {"size": len(classes), "sha256": table_digest(classes)},
        "store": stored,
    }
    return DraftLogSpec(where, identity)


@dataclass
class DraftLog:
    """One worker's part in writing a log: its places `share` of `own` in each group.

    `intervals` are the groups of the training, by the intervals between reports.
    """

    spec: DraftLogSpec
    intervals: Sequence[Sequence[int]]
    own: int
    share: slice
    tables: list[pa.Table] = field(default_factory=list)  # of the interval's groups so far

    def __post_init__(self) -> None:
        self.writer = StoreWriter(self.spec.where, self.spec.identity)
        self.key = int(digest_of(self.spec.identity)[:15], 16)
        self.shards: list[list[Shard]] = []  # of each interval, by place
        self.at: dict[int, tuple[int, int]] = {}  # group: its interval, and its place in that
        first = 0
        for interval, groups in enumerate(self.intervals):
            self.shards.append(self._shards(interval, first, len(groups)))
            self.at |= {group: (interval, position) for position, group in enumerate(groups)}
            first += self.own * len(groups)

    def add(self, group: int, batch: Batch) -> None:
        """Keep a group's drafts.

        The last group of an interval commits its shards, the last of the log finishes it.
        """
        interval, position = self.at[group]
        shards = self.shards[interval][self.share]
        row_id = np.array([shard.first + position for shard in shards], np.int64)
        if position == 0:
            self.tables = []
        self.tables.append(self._table(batch, row_id, group))
        if position + 1 < len(self.intervals[interval]):
            return
        for shard in self.writer.missing(shards):
            place = shards.index(shard)
            rows = pa.concat_tables([table.slice(place, 1) for table in self.tables])
            self.writer.commit(shard, self._packed(rows))
        self.tables = []
        every = [shard for shards in self.shards for shard in shards]
        # All commit before they look, so the last one sees every shard. `missing` would remove what
        # others are writing.
        if interval + 1 == len(self.intervals) and all(map(self.writer.is_sound, every)):
            self.writer.finish(every, {"rows": {SPLIT: every[-1].last}})

    def _shards(self, interval: int, first: int, count: int) -> list[Shard]:
        """The shards of an interval of `count` groups, whose rows start at `first`; one a place."""
        shards = []
        for place in range(self.own):
            start = first + place * count
            shards.append(Shard(interval * self.own + place, SPLIT, start, start + count))
        return shards

    def _table(self, batch: Batch, row_id: NDArray[np.int64], group: int) -> pa.Table:
        """The log's rows of a verified batch."""
        rollout = batch.rollout
        teacher = batch.teacher
        assert rollout is not None
        assert teacher is not None
        assert rollout.accepted is not None
        assert rollout.rejected is not None
        assert rollout.correction is not None
        mask = batch.mask.cpu()
        last_token = batch.label[:, -1:].to(batch.inputs)
        text = torch.cat([batch.inputs[..., 0], last_token], 1).cpu().int()
        in_text = _in_text(batch.inputs[..., 1].cpu(), mask)
        rejected = (rollout.rejected & batch.mask).cpu()
        accepted = (rollout.accepted & batch.mask).sum(1).cpu()
        correction = torch.where(rejected, rollout.correction.cpu(), 0).sum(1)
        correction = torch.where(rejected.any(1), correction, NONE)
        numbers: dict[str, NDArray[Any]] = {
            "row_id": row_id,
            "row": batch.row_id.cpu().numpy().astype(np.int64),
            "drawn": np.full(len(row_id), group, np.int32),
            "text_steps": in_text.sum(1).astype(np.int32),
            "steps": mask.sum(1).numpy().astype(np.int32),
            "accepted": accepted.numpy().astype(np.int32),
            "correction": correction.numpy().astype(np.int32),
        }
        columns: dict[pa.Field, pa.Array] = {}
        for name, values in numbers.items():
            columns[pa.field(name, pa.from_numpy_dtype(values.dtype))] = pa.array(values)
        tokens = text.numpy()
        columns[codec.field("text", tokens, "text_steps")] = codec.encode(tokens, in_text)
        log_q = rollout.log_q.float().cpu().numpy()
        columns[codec.field("log_q", log_q, "steps")] = codec.encode(log_q, mask.numpy())
        logits = self.spec.codec.encode(teacher.logits.detach(), batch.mask, row_id, self.key)
        columns[pa.field("logits", logits.type, nullable=False)] = logits
        return pa.table(list(columns.values()), schema=pa.schema(list(columns)))

    def _packed(self, table: pa.Table) -> pa.Table:
        """The same rows, their answers in the layout that takes the fewest bytes."""
        at = table.schema.get_field_index("logits")
        steps = table.column("steps").to_numpy()
        packed, layout = self.spec.codec.pack(table.column(at).combine_chunks(), steps)
        described = codec_metadata(self.spec.codec, layout)
        logits = pa.field("logits", packed.type, nullable=False, metadata=described)
        return table.set_column(at, logits, packed)


def _in_text(places: Tensor, mask: Tensor) -> NDArray[np.bool_]:
    """(B, T + 1): the tokens of each text, from the last start of a document to its last draft.

    `places` (B, T) count tokens within their document, `mask` (B, T) are the drafted positions.
    """
    at = torch.arange(places.shape[1] + 1)
    starts = (places == 0) & (at[:-1] <= mask.long().argmax(1, keepdim=True))
    first = torch.where(starts, at[:-1], 0).amax(1, keepdim=True)
    last = torch.where(mask, at[:-1], 0).amax(1, keepdim=True)
    return ((at >= first) & (at <= last + 1)).numpy()
