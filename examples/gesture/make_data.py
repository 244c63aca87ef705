"""Remake raykd/data/shipped/watch_gestures.npz from the wheel of seglearn 1.2.5.

    pip download --no-deps seglearn==1.2.5
    python examples/gesture/make_data.py seglearn-1.2.5-py3-none-any.whl

The recordings go from 50 Hz to 25 Hz (each pair of samples averaged), are standardised per channel
over all recordings and rounded to thousandths, so that they fit int16: value = signal * scale +
offset has mean 0 and standard deviation 1, and value * sd + mean is in seglearn's units.
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

WHEEL_SHA256 = "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"
MEMBER = "seglearn/data/watch_dataset.npy"
OUT = Path(__file__).parents[2] / "raykd" / "data" / "shipped" / "watch_gestures.npz"
SCALE = 0.001


def main() -> None:
    """Read the arguments, write the file, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="seglearn-1.2.5-py3-none-any.whl")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="the file to write (default: %(default)s)"
    )
    args = parser.parse_args()
    arrays = convert(read_wheel(args.wheel))
    # numpy gives every member of the zip the same fixed date, so equal arrays are equal bytes (for
    # one zlib)
    np.savez_compressed(args.out, allow_pickle=False, **arrays)
    print(f"rows     {len(arrays['signal'])} steps of {len(arrays['label'])} recordings")
    print(f"classes  {' '.join(arrays['classes'])}")
    print(f"sha256   {hashlib.sha256(args.out.read_bytes()).hexdigest()}  {args.out}")


def read_wheel(path: Path) -> dict[str, Any]:
    """seglearn's watch data: X, y, subject, side and their names; refuses any other file."""
    wheel = path.read_bytes()
    # the data is a pickle, which can run code: only these exact bytes are unpickled
    if hashlib.sha256(wheel).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{path} is not the wheel of seglearn 1.2.5 (sha256 {WHEEL_SHA256})")
    with zipfile.ZipFile(io.BytesIO(wheel)) as members:
        return np.load(io.BytesIO(members.read(MEMBER)), allow_pickle=True).item()


def convert(data: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the npz file."""
    recordings = [halve_rate(x) for x in data["X"]]
    steps = np.concatenate(recordings)
    mean = steps.mean(0)
    sd = steps.std(0)
    return {
        "signal": np.rint((steps - mean) / sd / SCALE).astype(np.int16),
        "scale": np.full(len(mean), SCALE, np.float32),
        "offset": np.zeros(len(mean), np.float32),
        "mean": mean.astype(np.float32),
        "sd": sd.astype(np.float32),
        "start": np.cumsum([0, *map(len, recordings)], dtype=np.int64),
        "label": np.asarray(data["y"], np.int8),
        "subject": np.asarray(data["subject"], np.int8),
        "classes": np.array(data["y_labels"]),
        "channels": np.array(data["X_labels"]),
    }


def halve_rate(recording: np.ndarray) -> np.ndarray:
    """Each pair of samples averaged; an odd last sample is left out."""
    return recording[: len(recording) // 2 * 2].reshape(-1, 2, recording.shape[1]).mean(1)


if __name__ == "__main__":
    main()
