"""A recipe that cannot work is refused before any work: by its models, held against its data."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from raykd import data
from raykd.data.table import Held
from raykd.errors import RecipeError
from raykd.models import build
from raykd.recipe.tables import ModelRef, StudentRef
from raykd.stages import check
from raykd.stages.check import check_with_data
from raykd.stages.load import resolve

CLASSES = ("a", "b")


class Mean(nn.Module):
    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.mean(1))


class MaskedMean(Mean):
    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.head((inputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


MODELS = {
    "mean": Mean,
    "masked mean": MaskedMean,
    "five": lambda classes, channels: Mean(5, channels),
    "failing": lambda classes, channels: 1 / 0,
    "no module": lambda classes, channels: 3,
}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Checks a recipe over rows of these lengths."""

    def of_lengths(lengths: tuple[int, int], **tables: object) -> None:
        draws = np.random.default_rng(0)
        rows = [
            {
                "inputs": draws.normal(size=(lengths[i % 2], 3)).tolist(),
                "label": CLASSES[i // 3 % 2],
                "split": ("train", "val", "test")[i % 3],
            }
            for i in range(24)
        ]
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        raw = {"technique": "none", "data": {"source": str(folder)}, "control": False}
        raw["scale"] = tables.pop("scale", {})
        models = {key: ModelRef.model_validate(table) for key, table in tables.items()}
        recipe = resolve(raw).model_copy(update=models)
        check_with_data(recipe, data.open_source(recipe.data), tmp_path / "run")
        assert not Path(tmp_path / "run").exists()

    monkeypatch.setattr(build, "MODELS", build.MODELS | MODELS)
    return of_lengths


def test_rows_padded_before_a_step_need_a_model_that_does_not_read_it(told, tmp_path):
    """They passed beside a model without a mask, which read zeros as steps."""
    mask = np.ones((4, 6), bool)
    mask[2, :3] = False
    inputs = np.random.default_rng(0).normal(size=(4, 6, 3)) * mask[..., None]
    numbers = np.arange(4)
    rows = data.Rows(numbers, inputs.astype(np.float32), mask, numbers % 2, numbers)
    dataset = data.Dataset("rows", CLASSES, dict.fromkeys(("train", "val", "test"), rows))
    recipe = resolve({"technique": "none", "control": False})

    def check(model: str) -> None:
        student = recipe.model_copy(update={"student": StudentRef(model=model)})
        check_with_data(student, Held(dataset), tmp_path, with_export=False)

    check("masked mean")
    for model in ("mean", "series_encoder"):
        with pytest.raises(RecipeError, match=r"student\.model.*reads padding.*before steps"):
            check(model)


def test_the_built_in_student_and_a_mean_over_equal_rows_are_let_through(told):
    told((4, 9))
    told((9, 9), student={"model": "mean"})


def test_long_rows_cost_the_check_of_a_built_in_student_nothing(told, monkeypatch):
    """Its attention over a million steps took days; a user's own module is asked whole rows."""
    asked = []
    monkeypatch.setattr(check, "check_student", lambda _module, _key, rows: asked.append(rows))
    told((300, 500))
    told((300, 500), student={"model": "mean"})
    short, whole = asked
    assert short.inputs.shape == (2, 256, 3)
    assert whole.inputs.shape == (2, 500, 3)
    assert whole.mask.sum(1).tolist() == [300, 500]
    nothing = whole._replace(mask=whole.mask & (torch.arange(500) >= 256))
    assert check._cut(nothing, 256) is nothing


@pytest.mark.parametrize(
    ("student", "key", "message"),
    [
        ({"model": "mean"}, "student.model", "rows here are of unequal length"),
        ({"model": "five"}, "student.model", "5 classes, and the data have 2"),
        ({"settings": {"classes": 3}}, "student.model", "3 classes, and the data have 2"),
        ({"model": "failing"}, None, "student.model failing raised ZeroDivisionError"),
        ({"model": "no module"}, None, "student.model: no module gives a int; return an nn.Module"),
    ],
)
def test_a_student_that_cannot_is_refused_by_its_key(told, student, key, message):
    with pytest.raises(RecipeError, match=message) as refused:
        told((4, 9), student=student)
    assert refused.value.exit_code == 2
    assert key is None or [problem.key for problem in refused.value.problems] == [key]


def test_dropout_is_refused_where_several_workers_would_draw_it(told, monkeypatch):
    def dropping(classes: int, channels: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.1), Mean(classes, channels))

    monkeypatch.setitem(build.MODELS, "dropping", dropping)
    told((9, 9), student={"model": "dropping"})
    with pytest.raises(RecipeError, match=r"student\.model.*draws by chance in training \(0\)"):
        told((9, 9), student={"model": "dropping"}, scale={"workers": 2})
    with pytest.raises(RecipeError, match=r"student\.model.*leave scale\.micro out"):
        told((9, 9), student={"model": "dropping"}, scale={"micro": 2})


def test_a_teacher_that_reads_padding_is_refused_by_its_key(told):
    with pytest.raises(RecipeError, match=r"teacher\.model.*rows here are of unequal length"):
        told((4, 9), teacher={"model": "mean"})
