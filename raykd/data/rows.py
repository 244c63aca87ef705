"""Rows: what every source of data becomes, and the checks that every source must pass."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from raykd.errors import DataError
from raykd.targets import UNLABELLED

SPLITS = ("train", "val", "test")
CHUNK = 4096  # rows at a time: inputs may be memory maps of any size
SHOWN = 5  # row ids that an error lists
SERIES = {  # array: its type and number of axes
    "row_id": ("int64", 1),
    "inputs": ("float32", 3),
    "mask": ("bool", 2),
    "label": ("int64", 1),
    "group": ("int64", 1),
}
TEXT = SERIES | {"inputs": ("int32", 3), "label": ("int64", 2)}
SENTENCES = SERIES | {"inputs": ("int32", 3)}


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as arrays over N rows, T steps and K channels.

    Row ids are unique over the data set and ascend within the split. Arrays may be memory maps.

    Rows of text have int32 inputs (N, T, 2): a token, and its place in its document. Their label
    (N, T) is the next token at every step, and their mask is True where a loss applies: False on
    the prompt and on padding.

    Sentences are texts with one label each. They have int32 inputs (N, T, 1), their tokens, and a
    mask and labels like those of a series.

    Example:
        >>> import numpy as np
        >>> rows = Rows(
        ...     row_id=np.arange(2),
        ...     inputs=np.zeros((2, 5, 3), np.float32),
        ...     mask=np.ones((2, 5), bool),
        ...     label=np.array([0, 1]),
        ...     group=np.arange(2),
        ... )
        >>> len(rows), len(rows.take([0]))
        (2, 1)
    """

    row_id: NDArray[np.int64]  # (N,)
    inputs: NDArray[np.float32] | NDArray[np.int32]  # (N, T, K), zero where a series is padded
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
    def is_sentences(self) -> bool:
        return not self.is_text and self.inputs.dtype == np.int32

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """(N,): the rows with a label at any step."""
        known = self.label != UNLABELLED
        return known.any(1) if self.is_text else known

    def take(self, index: Any) -> "Rows":
        """The rows at `index` (a slice, mask or integer array)."""
        arrays: dict[str, Any] = {
            name: None if values is None else values[index] for name, values in vars(self).items()
        }
        return Rows(**arrays)


class Unfit(NamedTuple):
    """A row that nothing can be learnt from, and why."""

    row: int  # its number in the source
    why: str
    place: str = ""  # its file, and its number there


@dataclass(frozen=True)
class Dataset:
    """Rows in their splits, and the class names that labels index: for text, the tokens.

    Example:
        >>> import numpy as np
        >>> rows = Rows(
        ...     row_id=np.arange(2),
        ...     inputs=np.zeros((2, 5, 3), np.float32),
        ...     mask=np.ones((2, 5), bool),
        ...     label=np.array([0, 1]),
        ...     group=np.arange(2),
        ... )
        >>> Dataset("zeros", ("left", "right"), {"train": rows}).shape
        {'channels': 3, 'classes': 2, 'steps': 5}
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Rows]
    notes: tuple[str, ...] = ()  # what a reader of results must know of these rows
    unfit: tuple[Unfit, ...] = ()  # the rows that were left out
    tokens: tuple[str, ...] = ()  # of sentences: the tokens by their numbers

    @property
    def cautions(self) -> list[str]:
        """The notes, how many rows were left out, and the classes that a split has no row of."""
        found = list(self.notes)
        if self.unfit:
            total = len(self.unfit) + sum(map(len, self.splits.values()))
            first = self.unfit[0]
            found.append(
                f"{len(self.unfit)} of {total} rows left out as unfit, such as row {first.row}: "
                f"{first.why}"
            )
        if not self.is_text:
            for name, rows in self.splits.items():
                found += absent_classes(self.classes, np.unique(rows.label).tolist(), name)
        return list(dict.fromkeys(found))

    @property
    def shape(self) -> dict[str, int]:
        """The sizes that a model is built for: `channels`, `classes` and `steps`, and of sentences
        `tokens`.
        """
        _, steps, channels = self._any.inputs.shape
        sizes = {"channels": channels, "classes": len(self.classes), "steps": steps}
        return sizes | ({"tokens": len(self.tokens)} if self.is_sentences else {})

    @property
    def is_text(self) -> bool:
        return self._any.is_text

    @property
    def is_sentences(self) -> bool:
        return self._any.is_sentences

    @property
    def _any(self) -> Rows:
        """The rows of some split: all are of one shape."""
        return next(iter(self.splits.values()))

    @property
    def in_parts(self) -> bool:
        """Whether training rows are read in parts, and not held in memory: they are not."""
        return False

    @property
    def digest(self) -> str:
        """Hex sha256 of everything that a result can depend on: every array, and the classes."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return self._digest_of(SPLITS)

    @property
    def test_digest(self) -> str:
        """The digest of the test split alone; runs with an equal one are compared row by row."""
        return self._digest_of(("test",))

    def _digest_of(self, names: Iterable[str]) -> str:
        state = hashlib.sha256("\0".join(self.classes).encode())
        for name in names:
            for key, values in vars(self.splits[name]).items():
                state.update(f"{name}.{key}".encode())
                if values is None:
                    continue
                state.update(f"{values.dtype}{values.shape}".encode())
                for first in range(0, len(values), CHUNK):
                    chunk = np.ascontiguousarray(values[first : first + CHUNK])
                    state.update(chunk.data)
        return state.hexdigest()

    @property
    def labels(self) -> int:
        """The labels of training rows; for text, the tokens that are learned."""
        return int((self.splits["train"].label != UNLABELLED).sum())

    def describe(self) -> str:
        """One line: rows, classes, splits and digest."""
        return described(self, {name: len(rows) for name, rows in self.splits.items()})


class Facts(Protocol):
    """What `Dataset` and `Table` both know of rows without reading any."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> dict[str, int]:
        """The sizes that a model is built for: `channels`, `classes` and `steps`, and of sentences
        `tokens`.
        """
        ...

    @property
    def is_text(self) -> bool: ...

    @property
    def is_sentences(self) -> bool: ...

    @property
    def in_parts(self) -> bool:
        """Whether training rows are read in parts, and not held in memory."""
        ...

    @property
    def digest(self) -> str:
        """Hex sha256 of everything that a result can depend on."""
        ...

    @property
    def labels(self) -> int:
        """The labels of training rows; for text, the tokens that are learned."""
        ...

    @property
    def cautions(self) -> list[str]:
        """What a reader of results must know of these rows."""
        ...


def described(facts: Facts, rows: dict[str, int]) -> str:
    """One line: rows of each split, classes and digest."""
    counts = ", ".join(f"{name} {count}" for name, count in rows.items())
    labels = "training tokens" if facts.is_text else "training labels"
    classes = "tokens" if facts.is_text else "classes"
    return (
        f"{facts.name}: {counts} rows, {facts.labels} {labels}, {len(facts.classes)} {classes}, "
        f"sha256 {facts.digest[:12]}" + "".join(f"; {caution}" for caution in facts.cautions)
    )


def absent_classes(classes: Sequence[str], present: Iterable[int], split: str) -> list[str]:
    """What a reader must know of the classes that no row of a split has; nothing if there is none.

    `present` are the numbers of the others.
    """
    there = set(present)
    absent = [name for number, name in enumerate(classes) if number not in there]
    more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
    return [f"no row of class {', '.join(absent[:SHOWN])}{more} in {split}"] if absent else []


def check_dataset(dataset: Dataset) -> None:
    """DataError that names the rows of the first split that cannot be used."""
    for name in SPLITS:
        rows = dataset.splits.get(name)
        if rows is not None:
            _check_kinds(f"{dataset.name}, split {name!r}", rows)
        if rows is None or len(rows) == 0:
            check_counts(dataset.name, name, 0, 0)
        else:
            where = f"{dataset.name}, split {name!r}"
            if rows.is_sentences:
                check_tokens(where, rows, len(dataset.tokens))
            check_rows(where, rows, len(dataset.classes))
            labelled = len(rows) if rows.is_text else int(rows.labelled.sum())
            check_counts(dataset.name, name, len(rows), labelled)


def _check_kinds(where: str, rows: Rows) -> None:
    """DataError unless all is of arrays: a function may give anything."""
    for key, values in vars(rows).items():
        may_lack = key == "valence" and values is None
        if not may_lack and not isinstance(values, np.ndarray):
            raise DataError(f"{where}: {key} must be a numpy array, and is {type(values).__name__}")


def check_rows(where: str, rows: Rows, count: int) -> None:
    """DataError that names the rows that cannot be used, of `count` classes or tokens."""
    _check_arrays(where, rows)
    if rows.is_text:
        check_tokens(where, rows, count)
    elif not rows.is_sentences:
        finite = _by_chunks(lambda part: np.isfinite(part).all(axis=(1, 2)), rows.inputs)
        if bad := _ids(rows, ~finite):
            raise DataError(f"{where}: NaN or infinite inputs in rows {bad}; mend or drop them")
    if bad := _ids(rows, ~rows.mask.any(1)):
        raise DataError(f"{where}: rows {bad} hold no step")
    if not rows.is_text:
        _check_padding(where, rows)
    outside = (rows.label != UNLABELLED) & _outside(rows.label, count)
    if bad := _ids(rows, outside.reshape(len(rows), -1).any(1)):
        raise DataError(f"{where}: labels outside the {count} classes in rows {bad}")
    _check_valence(where, rows)


def check_tokens(where: str, rows: Rows, count: int) -> None:
    """DataError that names the rows that hold other tokens than the `count` of the tokeniser."""
    outside = _by_chunks(lambda part: _outside(part[..., 0], count).any(1), rows.inputs)
    if bad := _ids(rows, outside):
        raise DataError(f"{where}: tokens outside the {count} of the tokeniser in rows {bad}")


def _check_padding(where: str, rows: Rows) -> None:
    """DataError where padding is not 0: a model of one number of steps reads it."""
    filled = _by_chunks(_padded_with_values, rows.inputs, rows.mask)
    if bad := _ids(rows, filled):
        raise DataError(f"{where}: inputs other than 0 where mask is False in rows {bad}")


def _padded_with_values(inputs: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,): the rows whose inputs are not 0 at some invalid step."""
    if mask.all():
        return np.zeros(len(mask), bool)
    return ((inputs != 0).any(2) & ~mask).any(1)


def check_counts(name: str, split: str, rows: int, labelled: int) -> None:
    """DataError where a split has no row, or nothing that can be measured."""
    if rows == 0:
        raise DataError(
            f"{name}: split {split!r} has 0 rows; each of {', '.join(SPLITS)} needs some"
        )
    if split != "train" and labelled == 0:
        raise DataError(
            f"{name}, split {split!r}: no row has a label, so nothing can be measured there"
        )


def _outside(values: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Which values are not numbers from 0 to `count` - 1."""
    return (values < 0) | (values >= count)


def _check_valence(where: str, rows: Rows) -> None:
    if rows.valence is None:
        return
    outside = _by_chunks(lambda part: (np.abs(part) > 1).any(1), rows.valence)
    if bad := _ids(rows, outside):
        raise DataError(f"{where}: valence outside [-1, 1] in rows {bad}; rescale it")


def _check_arrays(where: str, rows: Rows) -> None:
    """DataError unless the arrays have the types and shapes of `Rows`: a function may give any."""
    kind = TEXT if rows.is_text else SENTENCES if rows.is_sentences else SERIES
    for key, (dtype, dims) in kind.items():
        values = getattr(rows, key)
        if values.dtype != dtype or values.ndim != dims or len(values) != len(rows):
            raise DataError(
                f"{where}: {key} must be {dtype} with {dims} axes and {len(rows)} rows, and is "
                f"{values.dtype} of shape {values.shape}"
            )
    fits = rows.inputs.shape[:2] == rows.mask.shape
    if rows.valence is not None:
        fits &= rows.valence.shape == rows.mask.shape and rows.valence.dtype == np.float32
    if not fits:
        raise DataError(
            f"{where}: inputs (N, T, K), mask (N, T) and float32 valence (N, T) must have equal "
            "N and T"
        )
    if (np.diff(rows.row_id) <= 0).any():
        raise DataError(f"{where}: row ids must ascend")


def _by_chunks(test: Any, *arrays: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,): `test` of CHUNK rows of the arrays at a time."""
    parts = [slice(first, first + CHUNK) for first in range(0, len(arrays[0]), CHUNK)]
    return np.concatenate([test(*(values[part] for values in arrays)) for part in parts])


def _ids(rows: Rows, faulty: Any) -> str:
    """The first ids of the faulty rows (a mask (N,)) and how many more; empty if there are none."""
    ids = rows.row_id[faulty]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(map(str, ids[:SHOWN])) + more


def hide_labels(rows: Rows, fraction: float, seed: int) -> Rows:
    """`rows` with ceil(fraction * n) labels kept in each class, drawn by `seed`.

    The other labels become UNLABELLED. For text, that share of the rows keeps its labels. Under one
    seed a smaller fraction keeps part of what a larger one keeps.
    """
    if fraction == 1:
        return rows
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    keeps = np.zeros(len(rows), bool)
    kind = np.where(rows.labelled, 0, UNLABELLED) if rows.is_text else rows.label
    share = Fraction(str(fraction))  # 0.07 of 100 is 7, not 8 as in floats
    for label in np.unique(kind[rows.labelled]):
        members = order[kind[order] == label]
        keeps[members[: ceil(share * len(members))]] = True
    keeps = keeps.reshape(-1, *(1,) * (rows.label.ndim - 1))
    return replace(rows, label=np.where(keeps, rows.label, UNLABELLED))
