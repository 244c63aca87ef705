"""What a model said of a split, kept with its arm: the answer at each place where one is to be
told.

A place is a row of series, and a step of a row of text.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd.data import Rows
from raykd.data.table import Source
from raykd.errors import StoreError
from raykd.files import parquet
from raykd.files.atomic import whole_file
from raykd.losses.shared_terms import kd
from raykd.signals import Batch, Headed, Signals, flatten_valid, log_softmax
from raykd.training import run_files
from raykd.training.device_rows import DeviceRows
from raykd.training.tally import Tally

Floats = NDArray[np.float32]

KINDS = {
    "place": pa.types.is_int64,
    "label": pa.types.is_int64,
    "answer": pa.types.is_int64,
    "log_q": pa.types.is_float32,
}
OPTIONAL = {"kl": pa.types.is_float32, "logits": pa.types.is_fixed_size_list}
EVAL_BATCH = 1024
LOGITS = 1 << 22  # of text, at once
GROUP = 1 << 16  # rows of a row group of a file, at least
INNER = 16  # values beside a hidden state, where logits are few at a time


@dataclass(frozen=True)
class TestPlaces:
    """Where a split is told: of text, place = row id * steps + step.

    These are all the numbers of a split that are ever held at once: 36 bytes a row of series; of
    text 32 a token, and 12 a row.
    """

    place: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,) UNLABELLED where hidden or missing
    group: NDArray[np.int64]  # (n,)
    row: NDArray[np.int64]  # (n,) in the split
    row_id: NDArray[np.int64]  # (N,) of all rows of the split
    steps: NDArray[np.int32]  # (N,) how many of its steps are valid
    is_text: bool = False

    @classmethod
    def of(cls, rows: Rows) -> "TestPlaces":
        """The places of a split in their order."""
        steps = rows.mask.sum(1).astype(np.int32)
        if not rows.is_text:
            row = np.arange(len(rows))
            return cls(rows.row_id, rows.label, rows.group, row, rows.row_id, steps)
        row, step = np.nonzero(rows.mask)
        return cls(
            rows.row_id[row] * rows.mask.shape[1] + step,
            rows.label[rows.mask],
            rows.group[row],
            row,
            rows.row_id,
            steps,
            is_text=True,
        )

    @classmethod
    def of_source(
        cls, source: Source, split: str, seen: Callable[[Rows], None] = lambda rows: None
    ) -> "TestPlaces":
        """The places of a split that is read part by part; each part is shown to `seen`."""
        pieces: list[TestPlaces] = []
        before = 0
        for part in source.table().of(split):
            rows = source.read(part)
            seen(rows)
            piece = cls.of(rows)
            pieces.append(replace(piece, row=piece.row + before))
            before += len(rows)
        if len(pieces) == 1:
            return pieces[0]
        names = ("place", "label", "group", "row", "row_id", "steps")
        arrays = {
            name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names
        }
        return cls(**arrays, is_text=pieces[0].is_text)


@dataclass(frozen=True)
class Predictions:
    """A model's answers at the n places of a split."""

    place: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,)
    answer: NDArray[np.int64]  # (n,) the likeliest class, or token
    log_q: Floats  # (n,) of the label; NaN without one
    kl: Floats | None = None  # (n,) KL(teacher || model) at temperature 1, where a store tells it
    logits: Floats | None = None  # (n, C) of series

    @property
    def classes(self) -> int | None:
        """How many classes the answers are of; None of text, which does not tell them."""
        return None if self.logits is None else self.logits.shape[1]

    def metrics(self) -> dict[str, float]:
        """Accuracy and mean negative log-likelihood over the labelled places, macro-F1 of series,
        and the mean KL where it is known.
        """
        tally = Tally(classes=self.classes, has_kl=self.kl is not None)
        tally.add(0, self.label, self.answer, self.log_q, self.kl)
        return tally.metrics()

    def without_logits(self) -> "Predictions":
        """The same, without the only numbers that are more than a few bytes a place."""
        return replace(self, logits=None)

    def table(self) -> pa.Table:
        """One row a place."""
        columns: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None}
        if self.logits is not None:
            flat = pa.array(np.ascontiguousarray(self.logits).ravel())
            columns["logits"] = pa.FixedSizeListArray.from_arrays(flat, self.logits.shape[1])
        return pa.table(columns)

    def write(self, path: Path) -> None:
        """A Parquet file, whole or not at all."""
        with writing(path) as add:
            add(self.table())


@contextmanager
def writing(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file to which tables are added one by one, and which is then whole at `path`.

    Small ones are joined to row groups of GROUP rows. Without any there is no file.
    """
    waiting: list[pa.Table] = []
    writers: list[pq.ParquetWriter] = []

    def write() -> None:
        joined = pa.concat_tables(waiting)
        if not writers:
            writers.append(pq.ParquetWriter(file, joined.schema))
        writers[0].write_table(joined)
        waiting.clear()

    def add(table: pa.Table) -> None:
        waiting.append(moved(table))
        if sum(map(len, waiting)) >= GROUP:
            write()

    with whole_file(path) as file:
        try:
            yield add
            if waiting:
                write()
        finally:
            for writer in writers:
                writer.close()


def moved(table: pa.Table) -> pa.Table:
    """A table in memory of Arrow's own.

    A small array of numpy's that stays may lie where a piece's inputs lay and keeps those of the
    next piece from that place, so that memory would grow by the inputs of every piece.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def write_all(path: Path, first: Predictions, rest: Iterable[Predictions]) -> None:
    """Write predictions that follow each other; where there are several, without their logits."""
    waiting = iter(rest)
    second = next(waiting, None)
    with writing(path) as add:
        if second is None:
            add(first.table())
            return
        for said in chain([first, second], waiting):
            add(said.without_logits().table())


def read(path: Path, *, logits: bool = True) -> Predictions:
    """What was written, with or without its logits. StoreError if that is not what is there."""
    table = _table(path, logits=logits)
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    found = columns.pop("logits", None)
    if found is not None:
        found = found.combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return Predictions(
        **{name: column.to_numpy() for name, column in columns.items()}, logits=found
    )


def _table(path: Path, *, logits: bool) -> pa.Table:
    """The columns of a file of predictions. StoreError if they are not there whole."""
    try:
        file = parquet.opened(path)
        names = [name for name in file.schema_arrow.names if logits or name != "logits"]
        table = file.read(columns=names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error)) from None
    missing = [name for name in KINDS if name not in table.column_names]
    if missing:
        raise damaged(path, f"no column {', '.join(missing)}")
    for entry in file.schema_arrow:
        is_kind = (KINDS | OPTIONAL).get(entry.name)
        is_read = entry.name in table.column_names
        has_nulls = is_read and table.column(entry.name).null_count > 0
        if is_kind is None or not is_kind(entry.type) or has_nulls:
            raise damaged(path, f"a column {entry.name} that raykd does not write")
    return table.combine_chunks()


def damaged(path: Path, fault: str) -> StoreError:
    """The error of a file of predictions; it says what to delete."""
    whose = path.parent if (path.parent / run_files.ARM).exists() else path
    return StoreError(f"{path} is damaged: {fault}; delete {whose} and run again")


def of_logits(rows: Rows, logits: Floats) -> Predictions:
    """The predictions of a split of series from its logits (N, C)."""
    places = TestPlaces.of(rows)
    z = logits.astype(np.float64)
    log_q = np.full(len(z), np.nan, np.float32)
    known = places.label >= 0
    norm = np.logaddexp.reduce(z[known], axis=1)
    log_q[known] = z[known, places.label[known]] - norm
    return Predictions(places.place, places.label, z.argmax(1), log_q, logits=logits)


def of_model(model: nn.Module, split: Rows, rows: DeviceRows) -> Predictions:
    """A model's predictions of a split, in eval mode; `rows` are the split's tensors.

    On text they have the KL to the teacher where `rows` hold its answers at temperature 1.
    """
    if split.is_text:
        return of_text(model, split, rows)
    return of_logits(split, sequence_logits(model, rows))


@torch.inference_mode()
def sequence_logits(model: nn.Module, rows: DeviceRows) -> NDArray[np.float32]:
    """(N, C): the mean logits over valid steps of every row, the model in eval mode."""
    training = model.training
    model.eval()
    parts = [
        model(rows.inputs[i : i + EVAL_BATCH].to(rows.device), rows.mask[i : i + EVAL_BATCH])
        .sequence_logits()
        .float()
        .cpu()
        for i in range(0, len(rows.inputs), EVAL_BATCH)
    ]
    model.train(training)
    return torch.cat(parts).numpy()


@torch.inference_mode()
def of_text(model: nn.Module, split: Rows, rows: DeviceRows) -> Predictions:
    """A model's predictions of a split of text, in batches of about LOGITS logits."""
    training = model.training
    batches: list[dict[str, Any]] = []
    size = None
    model.eval()
    first = 0
    while first < len(rows.label):
        last = min(first + (size or 1), len(rows.label))
        index = torch.arange(first, last, device=rows.device)
        batches.append(_of_text_batch(model, rows, index))
        first += len(index)
        size = size or max(1, LOGITS // (rows.mask.shape[1] * batches[0].pop("classes")))
    model.train(training)
    return _joined(TestPlaces.of(split), batches, has_kl=rows.teaches_logits)


@torch.inference_mode()
def of_calls(
    model: nn.Module, places: TestPlaces, calls: Iterable[DeviceRows], *, has_kl: bool
) -> Predictions:
    """A model's predictions at some places of text, whose rows are read call by call."""
    training = model.training
    model.eval()
    batches = [
        _of_text_batch(model, rows, torch.arange(len(rows.label), device=rows.device))
        for rows in calls
    ]
    model.train(training)
    return _joined(places, batches, has_kl=has_kl)


def _of_text_batch(model: nn.Module, rows: DeviceRows, index: Tensor) -> dict[str, Any]:
    """(P,) of each value at the P valid places of the rows at `index`, and how many classes."""
    batch = rows.batch(index)
    signals = model(batch.inputs, batch.mask)
    label = batch.label[batch.mask]
    if signals.headed is not None:
        return _from_head(signals, signals.headed, batch, rows)
    log_q = flatten_valid(signals.log_q, batch.mask)  # (P, V)
    log_q_of_label = log_q.gather(1, label.clamp(min=0)[:, None])[:, 0]
    if rows.teaches_logits:
        divergence = kd(signals, batch, temperature=1.0).value[batch.mask]
    else:
        divergence = torch.full_like(log_q_of_label, 0)
    return {
        "answer": log_q.argmax(1),
        "log_q": torch.where(label >= 0, log_q_of_label, torch.nan),
        "kl": divergence,
        "classes": log_q.shape[1],
    }


def _from_head(signals: Signals, headed: Headed, batch: Batch, rows: DeviceRows) -> dict[str, Any]:
    """The same of a student whose logits are made for a few places at a time."""
    label = batch.label[batch.mask]
    hidden = flatten_valid(headed.hidden, batch.mask)
    answers: list[Tensor] = []
    of_label: list[Tensor] = []
    for at in torch.arange(len(label)).split(max(1, LOGITS // headed.columns)):
        z = torch.nn.functional.linear(hidden[at], headed.weight, headed.bias)
        log_q = log_softmax(z)
        answers.append(log_q.argmax(1))
        of_label.append(log_q.gather(1, label[at].clamp(min=0)[:, None])[:, 0])
    log_q_of_label = torch.cat(of_label)
    divergence = torch.zeros_like(log_q_of_label)
    if rows.teaches_logits:
        divergence = kd(signals, batch, temperature=1.0).value[batch.mask]
    return {
        "answer": torch.cat(answers),
        "log_q": torch.where(label >= 0, log_q_of_label, torch.nan),
        "kl": divergence,
        "classes": INNER * hidden.shape[1],
    }


def _joined(places: TestPlaces, batches: list[dict[str, Any]], *, has_kl: bool) -> Predictions:
    """What was said in these batches, in their order, at these places."""

    def joined(name: str) -> NDArray[Any]:
        return torch.cat([batch[name] for batch in batches]).cpu().numpy()

    kl = joined("kl") if has_kl else None
    return Predictions(places.place, places.label, joined("answer"), joined("log_q"), kl)
