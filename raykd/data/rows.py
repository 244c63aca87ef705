"""Rows: what every source of data becomes, and the checks that every source must pass."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.errors import DataError
from raykd.targets import UNLABELLED

SPLITS = ("train", "val", "test")
CHUNK = 4096  # rows at a time: inputs may be memory maps of any size
SERIES = {
    "row_id": ("int64", 1),
    "inputs": ("float32", 3),
    "mask": ("bool", 2),
    "label": ("int64", 1),
}
SERIES |= {"group": ("int64", 1)}
TEXT = SERIES | {"inputs": ("int32", 3), "label": ("int64", 2)}


@dataclass(frozen=True)
class Rows:
    """One split. Row ids are unique over the data set and ascend within it. Arrays may be memory
    maps.

    Rows of text have int32 inputs (N, T, 2), each a token and its place in its document, and a
    label (N, T) at every step: the token after it. Their mask says where that is to be told; a
    prompt's steps are read all the same.
    """

    row_id: NDArray[np.int64]  # (N,)
    inputs: (
        NDArray[np.float32] | NDArray[np.int32]
    )  # (N, T, K), zero where the mask of a series is False
    mask: NDArray[np.bool_]  # (N, T) valid steps
    label: NDArray[np.int64]  # (N,) or (N, T), UNLABELLED where hidden or missing
    group: NDArray[np.int64]  # (N,) rows of one recording share a group: they are not independent
    valence: NDArray[np.float32] | None = None  # (N, T) in [-1, 1], NaN where missing

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def is_text(self) -> bool:
        return self.label.ndim == 2

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """(N,): the rows with a label at any step."""
        return (self.label != UNLABELLED).reshape(len(self), -1).any(1)

    def take(self, index: Any) -> "Rows":
        """The rows at `index` (a slice, mask or integer array)."""
        taken: dict[str, Any] = {k: None if v is None else v[index] for k, v in vars(self).items()}
        return Rows(**taken)


@dataclass(frozen=True)
class Dataset:
    """Checked rows in their splits, with the class names that labels index: of text, the
    tokeniser's tokens.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Rows]

    @property
    def shape(self) -> dict[str, int]:
        """What a model must be built for: channels and steps of its inputs, classes of its answers."""
        _, steps, channels = self.splits["train"].inputs.shape
        return {"channels": channels, "classes": len(self.classes), "steps": steps}

    @property
    def is_text(self) -> bool:
        return self.splits["train"].is_text

    @property
    def digest(self) -> str:
        """Hex sha256 of everything a result can depend on: ids, inputs, masks, labels, groups,
        valence, classes.
        """
        return self._digest_of(SPLITS)

    @property
    def test_digest(self) -> str:
        """The same of the test split alone: where it is equal, two runs can be compared row by row."""
        return self._digest_of(("test",))

    def _digest_of(self, names: Iterable[str]) -> str:
        state = hashlib.sha256("\0".join(self.classes).encode())
        for name in names:
            for key, value in vars(self.splits[name]).items():
                state.update(f"{name}.{key}".encode())
                if value is not None:
                    state.update(f"{value.dtype}{value.shape}".encode())
                    for at in range(0, len(value), CHUNK):
                        state.update(np.ascontiguousarray(value[at : at + CHUNK]).data)
        return state.hexdigest()

    def describe(self) -> str:
        """One line: rows, classes, splits and digest."""
        counts = ", ".join(f"{n} {len(r)}" for n, r in self.splits.items())
        labelled = int((self.splits["train"].label != UNLABELLED).sum())
        kinds = ("tokens to tell", "tokens") if self.is_text else ("training labels", "classes")
        return (
            f"{self.name}: {counts} rows, {labelled} {kinds[0]}, {len(self.classes)} {kinds[1]}, "
            f"sha256 {self.digest[:12]}"
        )


def checked(dataset: Dataset) -> Dataset:
    """`dataset` itself, or a DataError that says which rows of which split can not be used."""
    for name in SPLITS:
        rows = dataset.splits.get(name)
        if rows is None or len(rows) == 0:
            raise DataError(
                f"{dataset.name}: split {name!r} has 0 rows; every one of {', '.join(SPLITS)} needs some"
            )
        _check_split(dataset, name, rows)
    return dataset


def _check_split(dataset: Dataset, name: str, rows: Rows) -> None:
    where, count = f"{dataset.name}, split {name!r}", len(dataset.classes)
    _check_arrays(where, rows)
    if rows.is_text:
        outside = _by_chunks(
            lambda part: ((part[..., 0] < 0) | (part[..., 0] >= count)).any(1), rows.inputs
        )
        if bad := _ids(rows, outside):
            raise DataError(f"{where}: tokens outside the {count} of the tokeniser in rows {bad}")
    elif bad := _ids(
        rows, ~_by_chunks(lambda part: np.isfinite(part).all(axis=(1, 2)), rows.inputs)
    ):
        raise DataError(f"{where}: NaN or infinite inputs in rows {bad}; mend or drop them")
    if bad := _ids(rows, ~rows.mask.any(1)):
        raise DataError(f"{where}: rows {bad} hold no step")
    outside = (rows.label != UNLABELLED) & ((rows.label < 0) | (rows.label >= count))
    if bad := _ids(rows, outside.reshape(len(rows), -1).any(1)):
        raise DataError(f"{where}: labels outside the {count} classes in rows {bad}")
    _check_valence(where, rows)
    if rows.is_text:
        return
    present = set(np.unique(rows.label).tolist())
    absent = [c for i, c in enumerate(dataset.classes) if i not in present]
    if absent:
        raise DataError(
            f"{where}: no row of class {', '.join(absent)}; every class must occur in every split"
        )


def _check_valence(where: str, rows: Rows) -> None:
    outside = rows.valence is not None and _by_chunks(
        lambda part: (np.abs(part) > 1).any(1), rows.valence
    )
    if rows.valence is not None and (bad := _ids(rows, outside)):
        raise DataError(f"{where}: valence outside [-1, 1] in rows {bad}; rescale it")


def _check_arrays(where: str, rows: Rows) -> None:
    """DataError unless a function's own Rows have the types and shapes that every other source
    gives.
    """
    for key, (dtype, dims) in (TEXT if rows.is_text else SERIES).items():
        values = getattr(rows, key)
        if values.dtype != dtype or values.ndim != dims or len(values) != len(rows):
            found = f"{values.dtype} of shape {values.shape}"
            raise DataError(
                f"{where}: {key} must be {dtype} with {dims} axes and {len(rows)} rows, and is {found}"
            )
    wrong = rows.inputs.shape[:2] != rows.mask.shape or (
        rows.valence is not None
        and (rows.valence.shape != rows.mask.shape or rows.valence.dtype != np.float32)
    )
    if wrong:
        raise DataError(
            f"{where}: inputs (N, T, K), mask (N, T) and float32 valence (N, T) must have equal N and T"
        )
    if (np.diff(rows.row_id) <= 0).any():
        raise DataError(f"{where}: row ids must ascend")


def _by_chunks(test: Any, values: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,): `test` of CHUNK rows at a time."""
    return np.concatenate([test(values[at : at + CHUNK]) for at in range(0, len(values), CHUNK)])


def _ids(rows: Rows, faulty: Any) -> str:
    """The ids of faulty rows (a mask (N,)), the first five and a count; empty if there are none."""
    ids = rows.row_id[faulty]
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(str, ids[:5])) + more


def hide_labels(rows: Rows, fraction: float, seed: int) -> Rows:
    """`rows` with ceil(fraction * n) labels kept in each class, drawn by `seed`; the rest become
    UNLABELLED.

    Of text, that many rows keep theirs. Under one seed a smaller fraction keeps part of what a
    larger one keeps.
    """
    if fraction == 1:
        return rows
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    kept = np.zeros(len(rows), bool)
    kind = np.where(rows.labelled, 0, UNLABELLED) if rows.is_text else rows.label
    for label in np.unique(kind[rows.labelled]):
        members = order[kind[order] == label]
        kept[members[: ceil(Fraction(str(fraction)) * len(members))]] = (
            True  # 0.07 of 100 is 7, not 8 as in floats
        )
    return replace(
        rows,
        label=np.where(kept.reshape(-1, *(1,) * (rows.label.ndim - 1)), rows.label, UNLABELLED),
    )
