"""What a plan foretells of a store."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stored
from torch import nn

from raykd import data
from raykd.files.memory import anonymous_bytes
from raykd.stages import plan
from raykd.stages.load import resolve
from raykd.stages.run_folder import RunFolder


class Once(nn.Module):
    """Answers once for a series, or at each step."""

    def __init__(self, at_each_step: bool):
        super().__init__()
        self.at_each_step = at_each_step

    def forward(self, inputs):
        logits = inputs[..., :3]
        return logits if self.at_each_step else logits.mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stored.write(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("at_each_step", [True, False])
def test_a_teacher_that_answers_once_is_seen(folder, at_each_step):
    dataset = data.load(
        resolve({"technique": "none", "data": {"source": str(folder / "rows")}}).data
    )
    rows = dataset.splits["train"]
    assert plan._answers_once(Once(at_each_step), rows) is not at_each_step


def test_the_bytes_of_one_answer_a_row_are_foretold(folder, tmp_path):
    raw = {
        "data": {"source": str(folder / "rows")},
        "teacher": {"weights": str(folder / "teacher.safetensors")},
        "terms": {"kd": {}},
        "store": {"codec": "dense"},
    }
    run_folder = RunFolder(resolve(raw), tmp_path)
    rows = run_folder.dataset.splits.values()
    count = sum(len(split) for split in rows)
    width = 2 * stored.CLASSES + 4
    assert plan._store_bytes(run_folder, True) == count * (width + 24)
    steps = sum(int(split.mask.sum()) for split in rows)
    assert plan._store_bytes(run_folder, False) == steps * width + 24 * count


@pytest.mark.parametrize("order", ["rows", "blocks"])
def test_rows_in_parts_are_foretold_on_disk_and_rows_in_memory_in_memory(order, tmp_path):
    """Rows of 16 steps of 64 float32 values, and the bytes of each array of theirs."""
    found = {}
    for count in (100, 3300):
        folder = tmp_path / str(count)
        folder.mkdir()
        for split, rows in (("train", count), ("val", 10), ("test", 10)):
            inputs = [np.zeros((16, 64), np.float32).tolist()] * rows
            table = pa.table({"inputs": inputs, "label": [i % 2 for i in range(rows)]})
            pq.write_table(table, folder / f"{split}.parquet", row_group_size=100)
        raw = {"technique": "none", "data": {"source": str(folder)}, "optim": {"order": order}}
        run_folder = RunFolder(resolve(raw), tmp_path)
        found[count] = plan._memory(run_folder) - anonymous_bytes(), plan._disk(run_folder, False)
        del run_folder
    added = 3200 * (16 * 64 * 4 + 16 + 3 * 8)
    in_memory = found[3300][0] - found[100][0]
    on_disk = found[3300][1]["cache"] - found[100][1]["cache"]
    assert found[100][1]["store"] == 0  # no teacher is read
    assert in_memory == pytest.approx(added if order == "rows" else 0, abs=2**20)
    assert on_disk == (added if order == "blocks" else 0)
