"""The gestures that ship with raykd: 140 recordings of arm exercises by a sensor on the wrist.

They have 7 classes, 10 subjects and 6 channels at 25 Hz. `examples/gesture/make_data.py` makes the
file again. Source and licence: see NOTICE.
"""

from importlib import resources

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import Dataset, Rows
from raykd.errors import DataError
from raykd.recipe.tables import DataRef

TIME_SHARES = {"train": (0.0, 0.60), "val": (0.60, 0.72), "test": (0.72, 1.0)}
SUBJECT_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}


def load(ref: DataRef) -> Dataset:
    """The data set of windows of `ref.window` steps, split by time or by subject.

    The time split cuts each recording and leaves a gap of one window between its parts, so that no
    test window shares a step with training.
    """
    with (resources.files("raykd.data") / "shipped" / "watch_gestures.npz").open("rb") as file:
        raw = dict(np.load(file, allow_pickle=False))
    signal = raw["signal"] * raw["scale"] + raw["offset"]
    splits = {}
    first = 0
    for name in TIME_SHARES:
        start, recording = _windows(raw, name, ref)
        if not len(start):
            raise DataError(
                f"watch_gestures: no window of {ref.window} steps fits split {name!r}; "
                "lower data.window"
            )
        steps = start[:, None] + np.arange(ref.window)
        splits[name] = Rows(
            row_id=np.arange(first, first + len(start)),
            inputs=signal[steps].astype(np.float32),
            mask=np.ones(steps.shape, bool),
            label=raw["label"][recording].astype(np.int64),
            group=recording.astype(np.int64),
        )
        first += len(start)
    return Dataset("watch_gestures", tuple(raw["classes"].tolist()), splits)


def _windows(raw: dict[str, NDArray], split: str, ref: DataRef) -> tuple[NDArray, NDArray]:
    """(first step, recording) of every window of one split."""
    shares = TIME_SHARES if ref.split == "time" else SUBJECT_SHARES
    low, high = shares[split]
    subjects = np.unique(raw["subject"]).tolist()
    starts = []
    recordings = []
    for number, (begin, end) in enumerate(zip(raw["start"][:-1], raw["start"][1:], strict=True)):
        first = begin
        last = end
        if ref.split == "time":
            gap = ref.window if low else 0
            first = begin + int(low * (end - begin)) + gap
            last = begin + int(high * (end - begin))
        elif not low <= subjects.index(raw["subject"][number]) / len(subjects) < high:
            last = begin
        start = np.arange(first, last - ref.window + 1, ref.stride)
        starts.append(start)
        recordings.append(np.full(len(start), number))
    return np.concatenate(starts), np.concatenate(recordings)
