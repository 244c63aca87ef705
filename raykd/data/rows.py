"""Rows: what every source of data becomes, and the checks that every source must pass."""

import hashlib
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.errors import DataError

UNLABELLED = -100
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Rows:
    """One split. Row ids are unique over the data set and ascend within it."""

    row_id: NDArray[np.int64]  # (N,)
    inputs: NDArray[np.float32]  # (N, T, K), zero where the mask is False
    mask: NDArray[np.bool_]  # (N, T) valid steps
    label: NDArray[np.int64]  # (N,) UNLABELLED where hidden or missing
    group: NDArray[np.int64]  # (N,) rows of one recording share a group: they are not independent
    valence: NDArray[np.float32] | None = None  # (N, T) in [-1, 1], NaN where missing

    def __len__(self) -> int:
        return len(self.row_id)

    def take(self, index: Any) -> "Rows":
        """The rows at `index` (a slice, mask or integer array)."""
        taken: dict[str, Any] = {k: None if v is None else v[index] for k, v in vars(self).items()}
        return Rows(**taken)


@dataclass(frozen=True)
class Dataset:
    """Checked rows in their splits, with the class names that labels index."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Rows]

    @property
    def shape(self) -> dict[str, int]:
        """What a model must be built for: channels and steps of its inputs, classes of its answers."""
        _, steps, channels = self.splits["train"].inputs.shape
        return {"channels": channels, "classes": len(self.classes), "steps": steps}

    @property
    def digest(self) -> str:
        """Hex sha256 of everything a result can depend on: ids, inputs, masks, labels, groups, valence, classes."""
        state = hashlib.sha256("\0".join(self.classes).encode())
        for name in SPLITS:
            for key, value in vars(self.splits[name]).items():
                state.update(f"{name}.{key}".encode())
                if value is not None:
                    state.update(f"{value.dtype}{value.shape}".encode())
                    state.update(np.ascontiguousarray(value).data)
        return state.hexdigest()

    def describe(self) -> str:
        """One line: rows, classes, splits and digest."""
        counts = ", ".join(f"{n} {len(r)}" for n, r in self.splits.items())
        labelled = int((self.splits["train"].label != UNLABELLED).sum())
        return (
            f"{self.name}: {counts} rows, {labelled} training labels, {len(self.classes)} classes, "
            f"sha256 {self.digest[:12]}"
        )


def checked(dataset: Dataset) -> Dataset:
    """`dataset` itself, or a DataError that says which rows of which split can not be used."""
    for name in SPLITS:
        rows = dataset.splits.get(name)
        if rows is None or len(rows) == 0:
            raise DataError(f"{dataset.name}: split {name!r} has 0 rows; every one of {', '.join(SPLITS)} needs some")
        _check_split(dataset, name, rows)
    return dataset


def _check_split(dataset: Dataset, name: str, rows: Rows) -> None:
    where, count = f"{dataset.name}, split {name!r}", len(dataset.classes)
    if bad := _ids(rows, ~np.isfinite(rows.inputs).all(axis=(1, 2))):
        raise DataError(f"{where}: NaN or infinite inputs in rows {bad}; mend or drop them")
    if bad := _ids(rows, ~rows.mask.any(1)):
        raise DataError(f"{where}: rows {bad} hold no step")
    outside = (rows.label != UNLABELLED) & ((rows.label < 0) | (rows.label >= count))
    if bad := _ids(rows, outside):
        raise DataError(f"{where}: labels outside the {count} classes in rows {bad}")
    absent = [c for i, c in enumerate(dataset.classes) if not (rows.label == i).any()]
    if absent:
        raise DataError(f"{where}: no row of class {', '.join(absent)}; every class must occur in every split")
    if rows.valence is not None and (bad := _ids(rows, (np.abs(rows.valence) > 1).any(1))):
        raise DataError(f"{where}: valence outside [-1, 1] in rows {bad}; rescale it")


def _ids(rows: Rows, faulty: Any) -> str:
    """The ids of faulty rows (a mask (N,)), the first five and a count; empty if there are none."""
    ids = rows.row_id[faulty]
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(str, ids[:5])) + more


def hide_labels(rows: Rows, fraction: float, seed: int) -> Rows:
    """`rows` with ceil(fraction * n) labels kept in each class, drawn by `seed`; the rest become UNLABELLED.

    Under one seed a smaller fraction keeps part of what a larger one keeps.
    """
    if fraction == 1:
        return rows
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    kept = np.zeros(len(rows), bool)
    for label in np.unique(rows.label[rows.label != UNLABELLED]):
        members = order[rows.label[order] == label]
        kept[members[: ceil(Fraction(str(fraction)) * len(members))]] = True  # 0.07 of 100 is 7, not 8 as in floats
    return replace(rows, label=np.where(kept, rows.label, UNLABELLED))
