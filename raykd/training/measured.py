"""Splits that models are measured on: held on the device, or read in parts.

A split is told in pieces, which are dealt to the ranks. One in memory is one piece. Of one in parts
a piece is some thousand rows, wherever its parts begin; so neither the parts nor the number of
ranks change what is said of a row, or any sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd.data import Rows
from raykd.data.table import Held, Source
from raykd.files import parquet
from raykd.recipe.recipe import Scale
from raykd.store.reader import Store
from raykd.training import predictions
from raykd.training.arm import ONE_PROCESS, World
from raykd.training.device_rows import DeviceRows, to_device
from raykd.training.part_rows import SCALE, PartRows
from raykd.training.predictions import Predictions, TestPlaces
from raykd.training.tally import Tally

NOTHING: frozenset[str] = frozenset()
CALL_BYTES = 1 << 28  # of the inputs of a call, at most
PIECE_TOKENS = 1 << 18  # of text, with their padding
CALL_TOKENS = 1 << 13  # of text, with their padding, in a call
CALL_LOGITS = 1 << 28  # of text, in a call
Head = tuple[Tensor, Tensor | None]


class Measured(Protocol):
    """One split, told in pieces."""

    @property
    def pieces(self) -> int: ...

    @property
    def classes(self) -> int | None:
        """How many classes series have; None of text."""
        ...

    @property
    def has_kl(self) -> bool:
        """Whether the KL to the teacher is told."""
        ...

    @property
    def device(self) -> torch.device: ...

    def said(self, model: nn.Module, piece: int) -> Predictions:
        """What a model answers to a piece, in eval mode."""
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...


@dataclass(frozen=True)
class HeldSplit:
    """A split in memory, which is one piece."""

    rows: Rows
    name: str
    store: Store | None
    device: torch.device
    head: Head | None
    classes: int | None
    pieces: int = 1

    @property
    def has_kl(self) -> bool:
        return self.rows.is_text and self.store is not None and self.on_device.teaches_logits

    def said(self, model: nn.Module, piece: int) -> Predictions:
        return predictions.of_model(model, self.rows, self.on_device)

    def close(self) -> None:
        """Nothing reads ahead."""

    @cached_property
    def on_device(self) -> DeviceRows:
        """The rows as tensors, of the rank that has the piece."""
        return to_device(self.rows, self.name, self.store, NOTHING, self.device, self.head)


class PartSplit:
    """A split that is read in parts, through the node's shelf."""

    def __init__(
        self,
        source: Source,
        split: str,
        store: Store | None,
        device: torch.device,
        head: Head | None = None,
        scale: Scale = SCALE,
    ):
        table = source.table()
        self.rows = PartRows(source, split, store, NOTHING, device, head, scale)
        self.total = int(self.rows.sizes.sum())
        self.device = device
        self.tokens = len(table.classes) if table.is_text else 0
        self.classes = None if table.is_text else len(table.classes)
        steps = table.shape["steps"]
        if table.is_text:
            self.size = max(1, PIECE_TOKENS // steps)
        else:
            row_bytes = 4 * steps * table.shape["channels"]
            self.size = max(1, min(predictions.EVAL_BATCH, CALL_BYTES // row_bytes))
        self.pieces = -(-self.total // self.size)
        self.has_kl = table.is_text and store is not None and self.rows.teaches_logits

    def said(self, model: nn.Module, piece: int) -> Predictions:
        first = piece * self.size
        index = np.arange(first, min(first + self.size, self.total))
        rows = self.rows.rows_at(index)
        if piece + 1 < self.pieces:
            self.rows.begin(first + self.size, min(first + 2 * self.size, self.total))
        if self.tokens:
            calls = self._calls(rows, index)
            return predictions.of_calls(model, TestPlaces.of(rows), calls, has_kl=self.has_kl)
        return predictions.of_model(model, rows, self.rows.beside(rows, index)).without_logits()

    def close(self) -> None:
        self.rows.close()

    def _calls(self, rows: Rows, index: NDArray[np.int64]) -> Iterator[DeviceRows]:
        """The rows of text that are read together: as many tokens as a call may have, cut after
        the last that counts.
        """
        most = min(CALL_TOKENS, CALL_LOGITS // self.tokens)
        length = np.where(rows.mask, np.arange(1, rows.mask.shape[1] + 1), 0).max(1)
        for first, last in runs(length, most):
            here = slice(first, last)
            few = cut(rows.take(here), int(length[here].max()))
            yield self.rows.beside(few, index[here])


def runs(length: NDArray[np.integer], most: int) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other are read together: (first, last) of at least one row, and
    of `most` tokens when all are as long as the longest.
    """
    first = 0
    longest = 0
    for place, here in enumerate(length.tolist()):
        longest = max(longest, here)
        if place > first and longest * (place + 1 - first) > most:
            yield first, place
            first = place
            longest = here
    if first < len(length):
        yield first, len(length)


def cut(rows: Rows, steps: int) -> Rows:
    """Rows of text without what stands behind so many steps."""
    return Rows(
        rows.row_id, rows.inputs[:, :steps], rows.mask[:, :steps], rows.label[:, :steps], rows.group
    )


def measured(
    source: Source,
    split: str,
    store: Store | None,
    device: torch.device,
    head: Head | None = None,
    scale: Scale = SCALE,
) -> HeldSplit | PartSplit:
    """A split of a source; with a `store` that has all of its rows, also the KL to the teacher."""
    if not isinstance(source, Held):
        return PartSplit(source, split, store, device, head, scale)
    rows = source.dataset.splits[split]
    classes = None if rows.is_text else len(source.dataset.classes)
    return HeldSplit(rows, split, store, device, head, classes)


def dealt(pieces: int, world: World) -> range:
    """This rank's pieces: they follow each other, and none is left out or told twice."""
    first, last = (-(-pieces * edge // world.size) for edge in (world.rank, world.rank + 1))
    return range(first, last)


def tally(model: nn.Module, split: Measured, world: World = ONE_PROCESS) -> Tally:
    """What a model's answers to a split come to: each rank takes a share, and all get the sums."""
    found = Tally(split.pieces, split.classes, has_kl=split.has_kl)
    for piece in dealt(split.pieces, world):
        said = split.said(model, piece)
        found.add(piece, said.label, said.answer, said.log_q, said.kl)
    return found.of_all(world, split.device)


def write(model: nn.Module, split: Measured, path: Path, world: World = ONE_PROCESS) -> None:
    """Write a model's predictions of a split.

    Each rank writes its share as a file of its own; when all have, `join` makes them one.
    """
    own = path
    if world.size > 1:
        own = _of_rank(path, world.rank)
        own.unlink(missing_ok=True)  # an earlier attempt's; a rank may have no piece
    with predictions.writing(own) as add:
        for piece in dealt(split.pieces, world):
            add(split.said(model, piece).table())


def join(path: Path, world: World) -> None:
    """Make one file of what all ranks have written, a row group at a time."""
    if world.size == 1:
        return
    shares = [share for rank in range(world.size) if (share := _of_rank(path, rank)).exists()]
    if len(shares) == 1:
        shares[0].replace(path)
        return
    with predictions.writing(path) as add:
        for share in shares:
            file = parquet.opened(share)
            for group in range(file.num_row_groups):
                add(file.read_row_group(group, use_threads=False))
    for share in shares:
        share.unlink()


def _of_rank(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}-{rank}{path.suffix}")
