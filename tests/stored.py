"""Series on disk, a random teacher beside them, and its store under each codec."""

from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raykd.recipe.recipe import Recipe
from raykd.stages.load import resolve
from raykd.store.reader import Store

CLASSES = 7
CODECS = {
    "fp16": {"codec": "dense"},
    "int8": {"codec": "dense", "values": "int8"},
    "comb": {"codec": "comb", "points": 255},
    "topk": {"codec": "topk", "top": CLASSES},
    "hidden": {"codec": "hidden"},
}


def write(folder: Path) -> Path:
    """A Parquet folder of series of 1 to 16 steps, and a teacher beside it, in a new folder."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "inputs": rng.normal(size=(int(rng.integers(1, 17)), 6)).tolist(),
            "label": i % CLASSES,
            "split": ("train", "train", "train", "val", "test")[i // CLASSES % 5],
        }
        for i in range(40 * CLASSES)
    ]
    (folder / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows" / "part-0.parquet")
    by_hand.teacher(folder / "teacher.safetensors")
    return folder


def scored(folder: Path, codec: str, **changes: Any) -> tuple[Recipe, Store]:
    """(recipe, store) of the folder's rows under one codec."""
    raw = {
        "data": {"source": str(folder / "rows")},
        "teacher": {"weights": str(folder / "teacher.safetensors"), "settings": by_hand.SETTINGS},
        "student": {"settings": {"width": 8}},
        "terms": {"kd": {"temperature": 2.0}},
        "store": CODECS[codec] | {"rows_per_shard": 64, "batch": 32},
        "optim": {"steps": 30, "batch": 32, "evaluate_every": 15},
    }
    recipe = resolve(raw | changes)
    return recipe, Store(by_hand.score(recipe, folder / codec))
