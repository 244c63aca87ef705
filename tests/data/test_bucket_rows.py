"""Rows in a bucket are those of a folder, and what a server does is told with the file's name."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import objects
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raykd import data
from raykd.data import SPLITS, sources
from raykd.data.prepared.parts import PreparedParts
from raykd.data.table import read_split
from raykd.errors import DataError, InfraError, RecipeError, StoreError
from raykd.files import bucket
from raykd.files.bucket import Bucket
from raykd.orchestration.preparing import prepare_rows
from raykd.recipe.tables import DataRef
from raykd.stages.load import resolve
from raykd.teacher.identity import run_digest
from raykd.training.arms import arms_of
from raykd.training.run_arms import ArmRunner

FILES = {"train": 2, "val": 1, "test": 1}


def rows_of(split: str) -> list[dict]:
    rng = np.random.default_rng(len(split))
    return [
        {"inputs": rng.normal(size=(3 + i % 2, 2)).tolist(), "label": "ab"[i % 2], "split": split}
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def server():
    with objects.served() as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setattr(bucket, "RETRY", bucket.RETRY | {"max_retries": 1})
        yield environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    for split in SPLITS:
        path = folder / split / "a.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows_of(split)), path, row_group_size=5)
    (folder / "train" / "_SUCCESS.parquet").write_text("no data")
    return folder


def upload(folder: Path, prefix: str, **names: str) -> str:
    """The address of a copy of a folder's files, of which some have other names."""
    place = Bucket("bucket", prefix)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        place.put(names.get(path.parent.name, name), path.read_bytes())
    return f"s3://bucket/{prefix}"


@pytest.fixture(scope="module")
def url(server, folder) -> str:
    return upload(folder, "lab/rows")


def ref(source: Path | str, **settings) -> DataRef:
    return DataRef.model_validate({"source": str(source), **settings})


@pytest.fixture
def sources_of_one(folder, url, tmp_path, monkeypatch) -> list[str]:
    """A folder, a bucket and a function that give the same rows."""
    ordered = [row for split in sorted(SPLITS) for row in rows_of(split)]
    (tmp_path / "own.py").write_text(f"def rows():\n    yield from {ordered!r}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return [str(folder), url, "own:rows"]


def test_a_folder_a_bucket_and_a_function_give_one_digest(sources_of_one):
    """Of the rows, of the store's identity, and of the run."""
    runs = set()
    for source in sources_of_one:
        loaded = data.load(ref(source))
        recipe = resolve({"technique": "none", "data": {"source": source}})
        runs.add((loaded.digest, loaded.name, run_digest(recipe, loaded)))
    assert len(runs) == 1


def test_a_folder_a_bucket_and_a_function_give_one_student(sources_of_one):
    """And a folder and a bucket in parts another."""
    for order, sources_of_rows in (("rows", sources_of_one), ("blocks", sources_of_one[:2])):
        results = set()
        for source in sources_of_rows:
            recipe = resolve(
                {
                    "technique": "none",
                    "control": False,
                    "data": {"source": source},
                    "student": {"settings": {"width": 8, "layers": 1}},
                    "optim": {"steps": 6, "batch": 4, "order": order, "lanes": 2, "window": 2},
                }
            )
            runner = ArmRunner(recipe, None, torch.device("cpu"))
            [arm] = arms_of(recipe)
            student = runner.student(arm)
            runner.train_arm(arm, student)
            runner.train.close()
            results.add(b"".join(p.detach().numpy().tobytes() for p in student.parameters()))
        assert len(results) == 1, order


def test_the_run_of_rows_in_a_bucket_is_named_by_the_rows(folder, url, server):
    """Wherever they lie; a file more, and it is another."""

    def named(source: str) -> str:
        recipe = resolve({"technique": "none", "data": {"source": source}})
        return run_digest(recipe, data.load(recipe.data))

    moved = upload(folder, "else/rows")
    first = named(url)
    assert named(moved) == first
    Bucket("bucket", "else/rows").put("val/b.parquet", (folder / "val/a.parquet").read_bytes())
    assert named(moved) != first


def test_parts_in_a_bucket_are_the_parts_of_a_folder(folder, url):
    near, far = (sources.open_source(ref(source), "blocks") for source in (folder, url))
    assert far.table().parts == near.table().parts
    assert far.table().shape == near.table().shape
    for split in SPLITS:
        mine, theirs = (read_split(source, split) for source in (near, far))
        for key, values in vars(mine).items():
            assert values is None or np.array_equal(values, getattr(theirs, key))
    assert far.table().digest == sources.open_source(ref(url), "blocks").table().digest


def test_rows_are_prepared_from_a_bucket_into_a_bucket(server, tmp_path):
    lines = [json.dumps(row) + "\n" for split in SPLITS for row in rows_of(split)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("".join(lines))
    near = sources.open_source(ref(tmp_path / "rows"), "blocks", tmp_path / "home")
    url = upload(tmp_path / "rows", "lines/rows")
    far = sources.open_source(ref(url), "blocks", "s3://bucket/prepared/rows")
    for source in (near, far):
        assert isinstance(source, PreparedParts)
        assert not source.is_ready
        prepare_rows(source.work)
    assert far.table().parts == near.table().parts
    assert far.table().digest == near.table().digest
    for split in SPLITS:
        mine, theirs = (read_split(source, split) for source in (near, far))
        for key, values in vars(mine).items():
            assert values is None or np.array_equal(values, getattr(theirs, key))
    part = far.table().parts[0]
    place = far.work.folder.place
    place.put(part.file, (place.get(part.file) or b"")[::-1])
    with pytest.raises(StoreError, match=rf"s3://bucket/prepared/rows/.*{part.file} is damaged"):
        far.read(part)


def test_an_object_that_changes_or_vanishes_after_the_listing_is_named(folder, server):
    url = upload(folder, "changing")
    source = sources.open_source(ref(url), "blocks")
    part = source.table().of("val")[0]
    place = Bucket("bucket", "changing")
    place.put(part.file, (folder / "train/a.parquet").read_bytes())
    with pytest.raises(DataError, match=r"changing/val/a\.parquet was changed after it was listed"):
        source.read(part)
    place.delete(part.file)
    with pytest.raises(DataError, match=r"changing/val/a\.parquet vanished after") as caught:
        source.read(part)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("fault", ["denied", "broken", "slow"])
def test_what_a_server_refuses_is_told_with_the_file(folder, server, fault, monkeypatch):
    # the first file in order: while a slow one is answered, the server answers nothing else
    url = upload(folder, fault, test=f"test/{fault}.parquet")
    monkeypatch.setattr(bucket, "CLIENT", bucket.CLIENT | {"timeout": "10s"})
    monkeypatch.setattr(bucket, "RETRY", bucket.RETRY | {"max_retries": 0})
    bucket._client.cache_clear()
    with pytest.raises(InfraError, match=rf"s3://bucket/{fault}/test/{fault}\.parquet") as caught:
        data.load(ref(url))
    assert caught.value.exit_code == 5
    assert "check the server and AWS_ENDPOINT_URL" in str(caught.value)
    bucket._client.cache_clear()


def test_a_bucket_or_a_prefix_that_is_not_there_is_told(server):
    with pytest.raises(InfraError, match=r"there is no bucket 'nowhere'"):
        data.load(ref("s3://nowhere/rows"))
    with pytest.raises(DataError, match=r"data\.source s3://bucket/empty: no \*\.parquet file"):
        data.load(ref("s3://bucket/empty"))
    with pytest.raises(RecipeError, match=r"data\.source: must be a folder or s3://bucket/prefix"):
        resolve({"technique": "none", "data": {"source": "s3://Bucket_/rows"}})


def test_missing_credentials_are_told(url, monkeypatch):
    for key in objects.KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    bucket._client.cache_clear()
    with pytest.raises(InfraError, match=r"lab/rows.*AWS_ACCESS_KEY_ID"):
        data.load(ref(url))
    bucket._client.cache_clear()


def test_a_truncated_object_is_named(folder, server, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "rows"))
    path = copy / "test" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    url = upload(copy, "truncated")
    with pytest.raises(DataError, match=r"truncated/test/a\.parquet: not a readable Parquet file"):
        data.load(ref(url))
