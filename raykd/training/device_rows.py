"""A split as tensors on the device that trains, each row beside its teacher's answers."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.data import Rows
from raykd.data.order import Order, shuffled
from raykd.errors import StoreError
from raykd.recipe.tables import Optim
from raykd.signals import Batch, Headed, Signals, as_tensor
from raykd.store.layer_signals import is_signal
from raykd.store.logits import StoredLogits
from raykd.store.reader import Store
from raykd.store.stored_rows import StoredRows
from raykd.targets import UNLABELLED


@dataclass(frozen=True)
class DeviceRows:
    """One split as tensors on the device that trains, each row beside its teacher's signals.

    `head` turns hidden states, stored in place of logits, into logits. `place` is the position of
    each row in `inputs` where rows that could not be scored are left out. `mapped` says that a
    batch is gathered from files in memory maps, which is worth a thread of its own.
    """

    row_id: Tensor
    inputs: Tensor
    mask: Tensor
    label: Tensor
    valence: Tensor | None
    teacher: dict[str, Tensor]
    teacher_mask: Tensor | None
    stored: StoredLogits | None = None  # where `teacher` holds no dense logits
    head: tuple[Tensor, Tensor | None] | None = None
    place: Tensor | None = None
    saliency: Tensor | None = None  # (N,) NaN where unknown
    answer: Tensor | None = None  # (N,) the teacher's classes
    mapped: bool = False

    @property
    def device(self) -> torch.device:
        return self.label.device

    @property
    def row_shape(self) -> torch.Size:
        """The shape of one row's inputs, (T, K)."""
        return self.inputs.shape[1:]

    @property
    def readers(self) -> int:
        """Threads that make batches ahead; 0 where a batch is at hand at once."""
        return int(self.mapped)

    def order(self, optim: Optim, seed: int) -> Order:
        """The rows of every global batch."""
        return shuffled(self.labelled.cpu().numpy(), optim, seed)

    def expect(self, order: Order, step: int, share: slice) -> None:
        """Nothing is fetched ahead: all rows are here."""

    def close(self) -> None:
        """Nothing is to be ended."""

    @property
    def teaches_logits(self) -> bool:
        """Whether the teacher's distribution at temperature 1 is known."""
        if self.teacher_mask is None:
            return False
        return (
            "logits" in self.teacher
            or self.head is not None
            or (self.stored is not None and self.stored.serves(1.0))
        )

    @property
    def labelled(self) -> Tensor:
        """(N,) bool: the rows with a label at any step."""
        return (self.label != UNLABELLED).reshape(len(self.label), -1).any(1)

    def batch(self, index: Tensor, noise: Tensor | None = None) -> Batch:
        """The rows at `index` (B,), with `noise` (B, T, K) added to valid inputs."""
        place = (index if self.place is None else self.place[index]).to(self.inputs.device)
        inputs = self.inputs.index_select(0, place).to(self.device)
        mask = self.mask.index_select(0, index)
        if noise is not None:
            inputs = inputs + noise * mask.unsqueeze(-1)
        valence = None if self.valence is None else self.valence.index_select(0, index)
        row_id = self.row_id.index_select(0, index)
        label = self.label.index_select(0, index)
        stored = self.stored.take(index.cpu().numpy()) if self.stored else None
        targets = stored.targets(inputs.device) if stored and stored.is_sparse else None
        saliency, answer = (
            None if v is None else v.index_select(0, index) for v in (self.saliency, self.answer)
        )
        teacher = self._signals(index, stored)
        return Batch(
            row_id, inputs, mask, label, valence, teacher, targets, saliency, answer, split=self
        )

    def _signals(self, index: Tensor, stored: StoredLogits | None) -> Signals | None:
        if self.teacher_mask is None:
            return None
        at = {k: v.index_select(0, index) for k, v in self.teacher.items()}
        mask = self.teacher_mask.index_select(0, index)
        trajectory = at.get("trajectory")
        known = None
        if trajectory is not None:
            steps = self.mask.index_select(0, index) if trajectory.shape[1] > 1 else mask
            known = steps & trajectory.isfinite()
            trajectory = torch.where(known, trajectory, 0.0)
        others: dict[str, Any] = {
            "valence": trajectory,
            "layers": {k: v for k, v in at.items() if "." in k},
            "valence_mask": known,
        }
        if stored is not None and self.head is not None:
            return Signals.of_head(self._headed(stored, mask), mask, **others)
        none = mask.new_zeros((*mask.shape, 0), dtype=torch.float32)  # of a sparse store
        return Signals(at["logits"] if stored is None else none, mask, **others)

    def _headed(self, stored: StoredLogits, mask: Tensor) -> Headed:
        """Stored hidden states (B, T, D) with their head, of which logits are made on demand."""
        assert self.head is not None
        weight, bias = self.head
        valid = stored.decode()
        assert isinstance(valid, Tensor)
        valid = valid.to(weight.device).float()
        hidden = valid.new_zeros((*mask.shape, valid.shape[1])).index_put((mask,), valid)
        return Headed(hidden, weight, bias)


def to_device(
    rows: Rows,
    split: str,
    store: Store | None,
    needs: frozenset[str],
    device: torch.device,
    head: tuple[Tensor, Tensor | None] | None = None,
) -> DeviceRows:
    """A split's tensors; the store's signals are matched by row id and must exist for every row.

    `head` is the teacher's, for a store of its inputs. StoreError if the store holds other rows.
    """
    if store is None:
        return beside(rows, None, needs, device, head)
    place = None
    store.table(split)  # the node's copy, which all that follows reads
    is_stored = _stored_rows(store, split, rows)
    if not is_stored.all():  # inputs stay whole: they may be a memory map
        place = torch.from_numpy(np.flatnonzero(is_stored)).to(device)
        stored_values: dict[str, Any] = {
            name: values[is_stored]
            for name, values in vars(rows).items()
            if name != "inputs" and values is not None
        }
        rows = replace(rows, **stored_values)
    stored = store.stored(split, filter(is_signal, needs))
    return replace(beside(rows, stored, needs, device, head), place=place)


def beside(
    rows: Rows,
    stored: StoredRows | None,
    needs: frozenset[str],
    device: torch.device,
    head: tuple[Tensor, Tensor | None] | None = None,
) -> DeviceRows:
    """The tensors of some rows beside what a store holds of just these rows, in their order."""
    teacher: dict[str, Tensor] = {}
    mask = None
    encoded = None
    saliency = None
    answer = None
    if stored is not None:
        encoded = stored.logits()
        mask = as_tensor(stored.steps(rows.mask, is_text=rows.is_text))
        if encoded.codec.name == "dense":
            flat = encoded.decode()
            assert isinstance(flat, Tensor)
            padded = flat.new_zeros((*mask.shape, flat.shape[1])).index_put((mask,), flat)
            teacher["logits"] = padded.to(device)
            encoded = None
        saliency = _sent(stored.value("saliency"), device)
        answer = None if rows.is_text else _sent(stored.value("answer"), device)
        for name in sorted(needs - {"logits"}):
            teacher[name] = torch.from_numpy(stored.padded(name, rows.mask)).to(device)
    if head is not None:
        weight, bias = head
        head = (weight.to(device), None if bias is None else bias.to(device))
    mapped = isinstance(rows.inputs, np.memmap)
    return DeviceRows(
        row_id=as_tensor(rows.row_id).to(device),
        inputs=as_tensor(rows.inputs).to("cpu" if mapped else device),
        mask=as_tensor(rows.mask).to(device),
        label=as_tensor(rows.label).to(device),
        valence=None if rows.valence is None else as_tensor(rows.valence).to(device),
        teacher=teacher,
        teacher_mask=None if mask is None else mask.to(device),
        stored=encoded,
        head=head,
        saliency=saliency,
        answer=answer,
        mapped=mapped or encoded is not None,
    )


def _sent(values: NDArray[Any] | None, device: torch.device) -> Tensor | None:
    """(N,): a value a row on the device; None where there is none."""
    if values is None:
        return None
    return as_tensor(values.astype(np.int64) if values.dtype == np.int32 else values).to(device)


def _stored_rows(store: Store, split: str, rows: Rows) -> NDArray[np.bool_]:
    """(N,): which rows the store holds.

    StoreError unless they are all of them but those that could not be scored.
    """
    place = store.places_of(rows.row_id, split)
    is_stored = place >= 0
    stored = np.arange(len(store.row_id(split)))
    missing = len(rows) - len(stored)
    if missing != store.unscored(split) or not np.array_equal(place[is_stored], stored):
        raise StoreError("the store holds other rows than the data")
    return is_stored
