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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.data import UNLABELLED
from raykd.data.vocabulary import check_digest, table_digest
from raykd.errors import DataError, RecipeError, StoreError
from raykd.files.place import Address
from raykd.losses.terms import TERMS
from raykd.recipe.digest import digest_of
from raykd.recipe.recipe import TermSpec
from raykd.signals import Batch, Rollout, Signals
from raykd.store import columns as codec
from raykd.store.codecs import Codec
from raykd.store.commit import SCHEMA, Shard, StoreWriter
from raykd.store.logits import codec_for, metadata
from raykd.store.reader import Store

SPLIT, NONE = "train", -1
CODECS = ("dense", "comb", "topk")  # that keep answers by themselves


@dataclass(frozen=True)
class Kept:
    """Where a training's drafts are kept, and everything that their log depends on."""

    where: Address
    identity: dict[str, Any]

    @property
    def codec(self) -> Codec:
        return codec_for(self.identity["store"], self.identity["vocabulary"]["size"])


def kept(
    where: Address, run: str, classes: Sequence[str], temperature: float, store: dict[str, Any]
) -> Kept:
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
    return Kept(
        where, {"schema": SCHEMA, "drafts": drafts, "vocabulary": vocabulary, "store": stored}
    )


@dataclass
class DraftLog:
    """One worker's part in writing a log: its places `share` of `own` in every group of
    `intervals`.
    """

    kept: Kept
    intervals: Sequence[Sequence[int]]
    own: int
    share: slice
    held: list[pa.Table] = field(default_factory=list)  # of the groups of an interval so far

    def __post_init__(self) -> None:
        self.writer = StoreWriter(self.kept.where, self.kept.identity)
        self.key = int(digest_of(self.kept.identity)[:15], 16)
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
        logits = self.kept.codec.encode(teacher.logits.detach(), batch.mask, row_id, self.key)
        columns[pa.field("logits", logits.type, nullable=False)] = logits
        return pa.table(list(columns.values()), schema=pa.schema(list(columns)))

    def _packed(self, table: pa.Table) -> pa.Table:
        """With the answers in the layout that is smallest."""
        at, steps = table.schema.get_field_index("logits"), table.column("steps").to_numpy()
        packed, layout = self.kept.codec.pack(table.column(at).combine_chunks(), steps)
        field = pa.field(
            "logits", packed.type, nullable=False, metadata=metadata(self.kept.codec, layout)
        )
        return table.set_column(at, field, packed)


class Replay:
    """The drafts of a log, as batches.

    StoreError for a store of another kind, or one whose numbers can not be; DataError for another
    tokeniser's, or texts longer than the student was built for.
    """

    def __init__(self, where: Address, classes: Sequence[str], steps: int, device: torch.device):
        self.where, self.device, store = where, device, Store(where)
        try:
            told = store.manifest["identity"]["drafts"]
            vocabulary, self.temperature = (
                store.manifest["identity"]["vocabulary"],
                float(told["temperature"]),
            )
            size, sha256 = int(vocabulary["size"]), str(vocabulary["sha256"])
            self.logits = store.logits(SPLIT)
            text, log_q = store.column("text", SPLIT), store.column("log_q", SPLIT)
            names = ("row", "accepted", "correction", "steps", "text_steps")
            self.row, self.accepted, self.correction, self.steps, self.read = (
                _column(store, name) for name in names
            )
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"source.log: {where} is no log of drafts ({error!r}); a training with source.keep = true writes one"
            ) from None
        self.vocab = check_digest(sha256, size, classes)
        self.text, self.log_q = (torch.from_numpy(column.values.copy()) for column in (text, log_q))
        self.start, self.drawn = (steps.cumsum(0) - steps for steps in (self.read, self.steps))
        self._check()
        if (longest := int(self.read.max()) - 1) > steps:
            raise DataError(
                f"source.log: texts of {longest} tokens, but the student was built for {steps}"
            )

    def __len__(self) -> int:
        return len(self.row)

    def batch(self, index: NDArray[np.int64]) -> Batch:
        """The drafts at `index` (B,): those of the training that kept them, up to rounding and
        places nobody reads.
        """
        i = torch.from_numpy(index)
        read, steps, accepted = (
            values[i][:, None] for values in (self.read, self.steps, self.accepted)
        )
        at = torch.arange(int(read.max()))
        text = torch.where(
            at < read, self.text[(self.start[i][:, None] + at).clamp(max=len(self.text) - 1)], 0
        )
        at = at[:-1]
        nth = at - (read - 1 - steps)  # which of the drafted tokens a position is about
        mask = (nth >= 0) & (nth < steps)
        flat = (self.drawn[i][:, None] + nth)[mask]
        rejected = mask & (nth == accepted)
        stored = self.logits.take(index)
        logits = torch.zeros(*mask.shape, 0)
        if not stored.is_sparse:
            answers = stored.at()
            assert isinstance(answers, Tensor)
            logits = torch.zeros(*mask.shape, answers.shape[1]).index_put_((mask,), answers.float())
        inputs = torch.stack([text[:, :-1], torch.where(at < read - 1, at, 0)], -1)
        log_q = torch.zeros(mask.shape).masked_scatter(mask, self.log_q[flat].float())
        correction = torch.where(rejected, self.correction[i][:, None], 0)
        tail = torch.where(mask & (nth > accepted), nth - accepted, 0)
        label = torch.where(mask, text[:, 1:], UNLABELLED)
        found = (
            self.row[i],
            inputs,
            mask,
            label,
            logits,
            log_q,
            mask & (nth < accepted),
            rejected,
            correction,
            tail,
        )
        row, inputs, mask, label, logits, log_q, stayed, rejected, correction, tail = (
            x.to(self.device) for x in found
        )
        rollout = Rollout(
            log_q,
            torch.ones_like(log_q),
            0,
            self.temperature,
            stayed,
            rejected,
            correction=correction,
            tail=tail,
        )
        targets = stored.targets(self.device) if stored.is_sparse else None
        return Batch(
            row,
            inputs,
            mask,
            label,
            teacher=Signals(logits, mask),
            targets=targets,
            rollout=rollout,
        )

    def check(self, terms: Mapping[str, TermSpec], temperature: float) -> None:
        """RecipeError where a term can not be told from this log, or its drafts were drawn at
        another temperature.
        """
        if temperature != self.temperature:
            raise RecipeError(
                f"source.temperature = {temperature}, but {self.where} was drafted at {self.temperature}; write that"
            )
        draft = self.batch(np.zeros(1, np.int64))
        student = Signals(
            torch.zeros(*draft.mask.shape, self.vocab, device=self.device), draft.mask
        )
        for name, spec in terms.items():
            if spec.weight > 0 and TERMS[name].own:
                TERMS[name].make(student, draft, **spec.settings)

    def _check(self) -> None:
        vocab, codec = self.vocab, self.logits.codec
        sound = {
            "a temperature that is none": torch.tensor(0 < self.temperature < math.inf),
            "a codec that keeps no answers": torch.tensor(codec.name in CODECS),
            "answers of another vocabulary": torch.tensor(getattr(codec, "vocab", vocab) == vocab),
            "no drafts": torch.tensor(len(self.row) > 0),
            "texts that no draft ends": (self.steps >= 1) & (self.steps < self.read),
            "accepted tokens that were not drafted": (self.accepted >= 0)
            & (self.accepted <= self.steps),
            "corrections that do not fit": (self.correction >= NONE) & (self.correction < vocab),
            "rejections without a correction": (self.correction == NONE)
            == (self.accepted == self.steps),
            "tokens beyond the vocabulary": (self.text >= 0) & (self.text < vocab),
            "probabilities above 1": self.log_q <= 0,
        }
        if wrong := [name for name, right in sound.items() if not right.all()]:
            raise StoreError(f"source.log: {self.where} has {', '.join(wrong)}")


def _column(store: Store, name: str) -> Tensor:
    column = store.column(name, SPLIT).values
    if not np.issubdtype(column.dtype, np.integer):
        raise TypeError(f"{name} holds {column.dtype}")
    return torch.from_numpy(column.astype(np.int64))
