"""Wrist-worn arm-exercise gestures: 140 recordings, 7 classes, 10 subjects, 6 channels at 25 Hz,
shipped.

Source and licence: see NOTICE. `examples/gesture/make_data.py` remakes the file.
"""

from importlib import resources

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import Dataset, Rows
from raykd.errors import DataError
from raykd.recipe.recipe import DataRef

TIME_SHARES = {"train": (0.0, 0.60), "val": (0.60, 0.72), "test": (0.72, 1.0)}
SUBJECT_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}


def load(ref: DataRef) -> Dataset:
    """Windows of `ref.window` steps, split by time inside each recording or by subject.

    The time split leaves a gap of one window between parts, so that no test window shares a step
    with training.
    """
    with (resources.files("raykd.data") / "shipped" / "watch_gestures.npz").open("rb") as file:
        raw = dict(np.load(file, allow_pickle=False))
    signal = raw["signal"] * raw["scale"] + raw["offset"]
    parts = {name: _windows(raw, name, ref) for name in TIME_SHARES}
    splits, first = {}, 0
    for name, (start, recording) in parts.items():
        if not len(start):
            raise DataError(
                f"watch_gestures: no window of {ref.window} steps fits split {name!r}; lower data.window"
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
    starts, owners = [], []
    subjects = np.unique(raw["subject"]).tolist()
    for i, (begin, end) in enumerate(zip(raw["start"][:-1], raw["start"][1:], strict=True)):
        low, high = (TIME_SHARES if ref.split == "time" else SUBJECT_SHARES)[split]
        if ref.split == "time":
            first = begin + int(low * (end - begin)) + (ref.window if low else 0)
            last = begin + int(high * (end - begin))
        else:
            rank = subjects.index(raw["subject"][i]) / len(subjects)
            first, last = (begin, end) if low <= rank < high else (begin, begin)
        here = np.arange(first, last - ref.window + 1, ref.stride)
        starts.append(here)
        owners.append(np.full(len(here), i))
    return np.concatenate(starts), np.concatenate(owners)
