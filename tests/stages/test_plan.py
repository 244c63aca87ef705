"""What a plan foretells of a store."""

import pytest
import stored
from torch import nn

from raykd import data
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
