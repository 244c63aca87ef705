"""The log of verification: what a teacher said of a student's drafts, as a store that can be
trained on again.

    row_id      int64             the draft's number: by interval, place in the batch, group row
    int64             the data's row that it continues drawn       int32             the group that
    it was drafted in, named by the first step that used it text        int32 a token     prompt and
    draft, from the last start of a document on; `text_steps` of them steps       int32
    tokens of the draft, which end the text log_q       fp16 a step       the student's log
    probability of each, when it was drawn accepted    int32             how many of them stayed
    correction  int32             the teacher's token in place of the first that did not; -1 where
    all stayed logits      by a codec        the teacher's, a step for each drafted token

The files are those of every store (raykd/store/commit.py). A shard is one place of the global batch
over an interval between two reports: any number of workers writes the same ones, up to what the
order of sums does to weights, and a training resumed at a report writes none twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raykd.data.vocabulary import table_digest
from raykd.errors import RecipeError
from raykd.files.address import Address
from raykd.files.digests import digest_of
from raykd.signals import Batch
from raykd.store import columns as codec
from raykd.store.codecs import Codec
from raykd.store.commit import SCHEMA, Shard, StoreWriter
from raykd.store.logits import codec_for, metadata

SPLIT, NONE = "train", -1
CODECS = ("dense", "comb", "topk")  # that keep answers by themselves


@dataclass(frozen=True)
class DraftLogSpec:
    """Where a training's drafts are kept, and everything that their log depends on."""

    where: Address
    identity: dict[str, Any]

    @property
    def codec(self) -> Codec:
        return codec_for(self.identity["store"], self.identity["vocabulary"]["size"])


def draft_log_spec(
    where: Address, run: str, classes: Sequence[str], temperature: float, store: dict[str, Any]
) -> DraftLogSpec:
    """The log of a training named `run`. `store` is the recipe's table, whose codec the answers are
    kept by.

    RecipeError for a codec that keeps no answers by themselves.
    """
    if store["codec"] not in CODECS:
        raise RecipeError(
            f'source.keep: store.codec = "{store["codec"]}" keeps no answers; use "comb", "topk" or "dense"'
        )
    vocabulary = {"size": len(classes), "sha256": table_digest(classes)}
    stored = {key: value for key, value in store.items() if key not in ("rows_per_shard", "batch")}
    stored |= {"temperatures": sorted({temperature, 1.0})} if "temperatures" in store else {}
    drafts = {"run": run, "temperature": temperature}
    return DraftLogSpec(
        where, {"schema": SCHEMA, "drafts": drafts, "vocabulary": vocabulary, "store": stored}
    )


@dataclass
class DraftLog:
    """One worker's part in writing a log: its places `share` of `own` in every group of
    `intervals`.
    """

    spec: DraftLogSpec
    intervals: Sequence[Sequence[int]]
    own: int
    share: slice
    held: list[pa.Table] = field(default_factory=list)  # of the groups of an interval so far

    def __post_init__(self) -> None:
        self.writer = StoreWriter(self.spec.where, self.spec.identity)
        self.key = int(digest_of(self.spec.identity)[:15], 16)
        self.shards: list[list[Shard]] = []  # of each interval, by place
        first = 0
        for i, groups in enumerate(self.intervals):
            starts = [first + place * len(groups) for place in range(self.own)]
            self.shards += [
                [
                    Shard(i * self.own + k, SPLIT, start, start + len(groups))
                    for k, start in enumerate(starts)
                ]
            ]
            first += self.own * len(groups)
        self.at = {
            group: (i, k)
            for i, groups in enumerate(self.intervals)
            for k, group in enumerate(groups)
        }

    def add(self, group: int, batch: Batch) -> None:
        """Keep a group's drafts; with an interval's last, commit its shards; with the log's last,
        finish it.
        """
        interval, position = self.at[group]
        mine = self.shards[interval][self.share]
        row_id = np.array([shard.first + position for shard in mine], np.int64)
        self.held = [*(self.held if position else []), self._table(batch, row_id, group)]
        if position + 1 < len(self.intervals[interval]):
            return
        for shard in self.writer.missing(mine):
            k = mine.index(shard)
            self.writer.commit(
                shard, self._packed(pa.concat_tables([held.slice(k, 1) for held in self.held]))
            )
        self.held = []
        every = [shard for shards in self.shards for shard in shards]
        # all commit before they look, so the last one sees every shard; `missing` would remove what
        # others just write
        if interval + 1 == len(self.intervals) and all(map(self.writer.stands, every)):
            self.writer.finish(every, {"rows": {SPLIT: every[-1].last}})

    def _table(self, batch: Batch, row_id: NDArray[np.int64], group: int) -> pa.Table:
        rollout, teacher = batch.rollout, batch.teacher
        assert rollout is not None
        assert teacher is not None
        assert rollout.accepted is not None
        assert rollout.rejected is not None
        assert rollout.correction is not None
        mask = batch.mask.cpu()
        text = (
            torch.cat([batch.inputs[..., 0], batch.label[:, -1:].to(batch.inputs)], 1).cpu().int()
        )
        at = torch.arange(text.shape[1])
        starts = (batch.inputs[..., 1].cpu() == 0) & (
            at[:-1] <= mask.long().argmax(1, keepdim=True)
        )
        first, last = (
            torch.where(where, at[:-1], 0).amax(1, keepdim=True) for where in (starts, mask)
        )
        read = ((at >= first) & (at <= last + 1)).numpy()
        rejected = (rollout.rejected & batch.mask).cpu()
        correction = torch.where(rejected, rollout.correction.cpu(), 0).sum(1)
        whole: dict[str, Any] = {
            "row_id": row_id,
            "row": batch.row_id.cpu().numpy().astype(np.int64),
            "drawn": np.full(len(row_id), group, np.int32),
            "text_steps": read.sum(1).astype(np.int32),
            "steps": mask.sum(1).numpy().astype(np.int32),
            "accepted": (rollout.accepted & batch.mask).sum(1).cpu().numpy().astype(np.int32),
            "correction": torch.where(rejected.any(1), correction, NONE).numpy().astype(np.int32),
        }
        columns = {
            pa.field(name, pa.from_numpy_dtype(v.dtype)): pa.array(v) for name, v in whole.items()
        }
        log_q = rollout.log_q.float().cpu().numpy()
        columns[codec.field("text", text.numpy(), "text_steps")] = codec.encode(text.numpy(), read)
        columns[codec.field("log_q", log_q, "steps")] = codec.encode(log_q, mask.numpy())
        logits = self.spec.codec.encode(teacher.logits.detach(), batch.mask, row_id, self.key)
        columns[pa.field("logits", logits.type, nullable=False)] = logits
        return pa.table(list(columns.values()), schema=pa.schema(list(columns)))

    def _packed(self, table: pa.Table) -> pa.Table:
        """With the answers in the layout that is smallest."""
        at, steps = table.schema.get_field_index("logits"), table.column("steps").to_numpy()
        packed, layout = self.spec.codec.pack(table.column(at).combine_chunks(), steps)
        field = pa.field(
            "logits", packed.type, nullable=False, metadata=metadata(self.spec.codec, layout)
        )
        return table.set_column(at, field, packed)
