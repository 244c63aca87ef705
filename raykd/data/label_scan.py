"""One pass over the labels of all parts: the classes, and how many rows keep a label."""

from collections import Counter
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile, gettempdir
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.data import label_draw
from raykd.data.blocks import MISSING, Encoded
from raykd.data.held import classes_of
from raykd.data.rows import absent_classes
from raykd.data.table import PLACE_BITS
from raykd.errors import InfraError
from raykd.recipe.tables import DataRef


class Labels(NamedTuple):
    """What is known of the labels of all parts, by the number of the part."""

    classes: tuple[str, ...]
    labelled: list[int]
    notes: tuple[str, ...]  # the classes that a split has no row of
    counts: tuple[int, ...]  # of each class, the training rows that keep their label
    cutoffs: NDArray[np.uint64] | None  # of each class, where labels of training rows are hidden


def scan(columns: Iterable[tuple[str, Encoded]], name: str, ref: DataRef) -> Labels:
    """What the labels of all parts say; `columns` gives the split of each, and the labels.

    Where labels are hidden, those of training rows wait in a temporary file, 4 bytes a row, until
    all are counted.
    """
    seen: dict[str, int] = {}
    present: dict[str, set[str]] = {}
    labelled = []
    found: Counter[str] = Counter()  # labels of training rows
    hides = ref.label_fraction < 1
    with TemporaryFile() as file:
        written: dict[int, int] = {}  # the rows of each part in the file
        for number, (split, column) in enumerate(columns):
            for value in column.values:
                seen.setdefault(value, len(seen))
            used = np.unique(column.index[column.index != MISSING])
            present.setdefault(split, set()).update(column.values[i] for i in used)
            labelled.append(int((column.index != MISSING).sum()))
            if split == "train":
                counted = np.bincount(column.index[column.index != MISSING])
                found.update(dict(zip(column.values, counted.tolist(), strict=False)))
            if hides and split == "train":
                _write(file, column.mapped(seen, MISSING).astype(np.int32))
                written[number] = len(column.index)
        classes = classes_of(seen, name, ref)
        notes = []
        for split, names in present.items():
            notes += absent_classes(classes, map(classes.index, names), split)
        counts = np.array([found[name] for name in classes], np.int64)
        if not hides:
            return Labels(classes, labelled, tuple(notes), tuple(counts.tolist()), None)
        numbers = np.array([classes.index(value) for value in seen], np.int64)
        cutoffs = label_draw.cutoffs(
            lambda: ((row_id, label) for _, row_id, label in _written(file, written, numbers)),
            counts,
            ref.label_fraction,
            ref.label_seed,
        )
        counts[:] = 0
        for number, row_id, label in _written(file, written, numbers):
            stays = label_draw.stays(row_id, label, cutoffs, ref.label_seed)
            labelled[number] = int(stays.sum())
            counts += np.bincount(label[stays], minlength=len(classes))
    return Labels(classes, labelled, tuple(notes), tuple(counts.tolist()), cutoffs)


def _write(file: BinaryIO, index: NDArray[np.int32]) -> None:
    try:
        file.write(index.tobytes())
        file.flush()
    except OSError as error:
        raise InfraError(
            f"{gettempdir()}: {error.strerror}, while labels were written there; free that disk, "
            "or set TMPDIR to a folder with more room"
        ) from None


def _written(
    file: BinaryIO, written: dict[int, int], numbers: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """(the part, the ids of its labelled rows, their classes) of every part in the file."""
    file.seek(0)
    for number, count in written.items():
        index = np.frombuffer(file.read(4 * count), np.int32)
        place = np.flatnonzero(index != MISSING)
        yield number, (number << PLACE_BITS) + place, numbers[index[place]]
