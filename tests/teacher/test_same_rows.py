"""What is known before any work: the store's rows are the trained ones, and its codec fits them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stored
import torch
from safetensors.torch import load_file, save_file

from raykd import data
from raykd.errors import DataError, RecipeError
from raykd.orchestration.scoring import ShardActor
from raykd.orchestration.teachers import TeacherActor
from raykd.recipe.tables import StoreSettings
from raykd.teacher.identity import store_table, teacher_identity
from raykd.teacher.scorer import Header
from raykd.training.run_arms import ArmRunner


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = stored.write(tmp_path_factory.mktemp("same"))
    return folder, *stored.scored(folder, "fp16")


def test_training_refuses_rows_that_the_store_was_not_made_from(scored):
    folder, recipe, store = scored
    cpu = torch.device("cpu")
    assert ArmRunner(recipe, str(store.place), cpu).store
    path = folder / "rows" / "part-0.parquet"
    rows = pq.read_table(path).to_pylist()
    whole = path.read_bytes()
    rows[3]["inputs"] = np.add(rows[3]["inputs"], 1e-3).tolist()
    pq.write_table(pa.Table.from_pylist(rows), path)
    try:
        with pytest.raises(
            DataError, match=r"data\.source: rows has other rows here than"
        ) as caught:
            ArmRunner(recipe, str(store.place), cpu)
    finally:
        path.write_bytes(whole)
    assert caught.value.exit_code == 3


def test_a_teacher_that_was_changed_after_its_digest_was_taken_scores_and_tells_nothing(scored):
    """By whom the file is read last must be who says what was in it."""
    folder, recipe, store = scored
    identity = store.manifest["identity"]
    dataset = data.load(recipe.data)
    header = Header.of(recipe, dataset)
    shape = dataset.shape
    assert ShardActor(recipe, header, str(store.place), identity).fault is None
    assert TeacherActor(recipe, shape, teacher_identity(recipe)).teacher
    path = folder / "teacher.safetensors"
    whole = path.read_bytes()
    save_file({name: -value for name, value in load_file(path).items()}, path)
    words = r"^teacher\.weights: another one than this command began with \(sha256:"
    try:
        with pytest.raises(DataError, match=words) as caught:
            ShardActor(recipe, header, str(store.place), identity)({})
        with pytest.raises(DataError, match=words):
            TeacherActor(recipe, shape, identity["teacher"])
    finally:
        path.write_bytes(whole)
    assert caught.value.exit_code == 3
    other = identity | {"teacher": identity["teacher"] | {"code": "of another node"}}
    with pytest.raises(DataError, match=r"^teacher\.model: .*None here, of another node there"):
        ShardActor(recipe, header, str(store.place), other)({})


@pytest.mark.parametrize("classes", [2, stored.CLASSES])
def test_more_likeliest_classes_than_there_are_is_refused_by_key(scored, classes):
    _, recipe, _ = scored
    top = recipe.model_copy(update={"store": StoreSettings(codec="topk", top=classes + 1)})
    words = (
        rf"^store\.top = {classes + 1}: the data have {classes} classes; write at most {classes}"
    )
    with pytest.raises(RecipeError, match=words):
        store_table(top, classes)
    assert store_table(top, classes + 1)["top"] == classes + 1


@pytest.mark.parametrize("temperature", ["inf", "nan", "0", "-1"])
def test_a_temperature_is_a_finite_number_above_0(temperature):
    with pytest.raises(ValueError, match="temperatures"):
        StoreSettings(codec="topk", temperatures=[float(temperature)])
