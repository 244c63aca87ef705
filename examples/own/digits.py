"""Your own rows. Here: handwritten digits, read from top to bottom as 8 steps of 8 pixels.

Run as a script, it writes the same rows as a Parquet folder.
"""

from collections.abc import Iterator
from typing import Any

from sklearn.datasets import load_digits


def rows() -> Iterator[dict[str, Any]]:
    """Every row: inputs (steps, channels), label, split; `group` and `valence` may stand beside them."""
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "train" if i % 10 < 6 else "val" if i % 10 < 8 else "test"
        yield {"inputs": (image / 16).tolist(), "label": int(label), "split": part}


if __name__ == "__main__":
    import pathlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    pathlib.Path("digits").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows())), "digits/part-0.parquet")
