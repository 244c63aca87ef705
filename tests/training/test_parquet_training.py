"""A student learns from Parquet in parts what it learns from the same rows in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raykd.data import sources
from raykd.data.parquet_parts import ParquetParts
from raykd.data.table import Held
from raykd.recipe.recipe import Recipe
from raykd.stages.load import resolve
from raykd.training.arms import arms_of
from raykd.training.loop import train
from raykd.training.run_arms import ArmRunner


def write(folder: Path) -> None:
    """Rows whose first channel tells their class, in the order of classes, which is worst."""
    for split, count in (("train", 240), ("val", 60), ("test", 60)):
        rng = np.random.default_rng(count)
        label = np.arange(count) * 3 // count
        inputs = rng.normal(size=(count, 4, 2)).astype(np.float32)
        inputs[:, :, 0] += 2 * label[:, None]
        table = pa.table({"inputs": inputs.tolist(), "label": label})
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=20)


def accuracy(recipe: Recipe, order: str, kind: type) -> float:
    source = sources.open_source(recipe.data, order)
    assert isinstance(source, kind)
    runner = ArmRunner(recipe, None, torch.device("cpu"), source=source)
    [arm] = arms_of(recipe)
    student = runner.student(arm)
    train(arm, recipe.optim, student, runner.train, lambda _: {})
    return runner.validate(student)["val_accuracy"]


def test_parts_teach_what_rows_in_memory_teach(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows")
    recipe = resolve(
        {
            "technique": "none",
            "control": False,
            "data": {"source": str(tmp_path / "rows")},
            "student": {"settings": {"width": 8, "layers": 1}},
            "optim": {"steps": 60, "batch": 20, "lanes": 20, "window": 99, "learning_rate": 0.02},
        }
    )
    held = accuracy(recipe, "rows", Held)
    parts = accuracy(recipe, "blocks", ParquetParts)
    assert min(held, parts) > 0.8
    assert abs(held - parts) < 0.15
