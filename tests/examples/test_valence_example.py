"""The example of human ratings reads its source as told: order, splits, features; on an archive
made here, offline.
"""

import hashlib
import importlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from raykd.errors import DataError

ROOT = Path(__file__).parents[2]
REVIEWS = "".join(
    f"{d}_{s}\t{(d % 5 - 2) + s / 10}\tsentence {s} of {d} is good!\r\n"
    for s in (10, 2, 1)
    for d in range(40)
)
FILES = {
    "amazonReviewSnippets": "\ufeff" + REVIEWS,  # the source has this mark in some of its files
    "nytEditorialSnippets": "1_1\t0.5\tan editorial\n",
    "movieReviewSnippets": "".join(f"{i}\t{i - 5}.0\tmovie {i}\n" for i in range(1, 10)),
    "tweets": "1\t-4\ta tweet\twith a tab\n",
}


@pytest.fixture
def example(monkeypatch):
    """(make_data, reviews), found from the repository's root as a recipe finds them."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    return [
        importlib.import_module(f"examples.valence.{name}") for name in ("make_data", "reviews")
    ]


@pytest.fixture
def package(example) -> bytes:
    """A source package of the same shape, with other sentences in it."""
    inner = io.BytesIO()
    outer = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, text in FILES.items():
            data = text.encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with zipfile.ZipFile(outer, "w") as members:
        members.writestr(example[0].MEMBER, inner.getvalue())
    return outer.getvalue()


@pytest.fixture
def file(example, package, tmp_path) -> str:
    sentences = list(example[0].read(package, hashlib.sha256(package).hexdigest()))
    return str(example[0].write(sentences, tmp_path / "data"))


def test_another_package_is_refused(example, package, tmp_path, monkeypatch):
    path = tmp_path / "vaderSentiment-0.5.zip"
    path.write_bytes(package)
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="not the source package"):
        example[0].main()
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_network_the_error_says_what_to_type(example, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        SystemExit, match=r"could not be downloaded .*\n.*pip download .*\n.*make_data.py PATH"
    ):
        example[0].fetch()


def test_sentences_come_in_their_order_with_ratings_in_the_range_of_valence(example, package):
    found = list(example[0].read(package, hashlib.sha256(package).hexdigest()))
    reviews = [s for s in found if s[0] == "reviews"]
    assert [s[1:3] for s in reviews] == [(d, s) for d in range(40) for s in (1, 2, 10)]
    assert reviews[0] == ("reviews", 0, 1, pytest.approx(-1.9 / 4), "sentence 1 of 0 is good!")
    assert found[-1] == ("tweets", 1, 1, -1.0, "a tweet\twith a tab")


def test_rows_are_reviews_in_order_and_no_review_lies_in_two_splits(example, file):
    rows = list(example[1].rows(channels=32, window=2, stride=1, file=file))
    reviews = [r for r in rows if r["group"].startswith("review")]
    splits = {
        name: {r["group"] for r in reviews if r["split"] == name}
        for name in ("train", "val", "test")
    }
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 40
    assert [r["valence"].tolist() for r in reviews[:2]] == [
        pytest.approx([-0.475, -0.45]),
        pytest.approx([-0.45, -0.25]),
    ]
    assert {r["label"] for r in reviews if r["group"] == "review 1"} == {"below"}
    assert {r["label"] for r in reviews if r["group"] == "review 4"} == {"above"}


def test_sentences_without_a_document_only_train(example, file):
    rows = list(example[1].rows(channels=32, window=4, file=file))
    lessons = [r for r in rows if r["group"].startswith("lesson")]
    assert {r["split"] for r in lessons} == {"train"}
    assert sum(len(r["inputs"]) for r in lessons) == 10
    assert len(rows) - len(lessons) == len(
        list(example[1].rows(channels=32, window=4, with_lessons=False, file=file))
    )


def test_features_are_the_same_in_every_process(example):
    here = example[1].features("Not good, not bad :)", 64)
    code = (
        "from examples.valence.reviews import features; "
        "print(features('Not good, not bad :)', 64).tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == here.tobytes().hex(), done.stderr
    assert np.linalg.norm(here) == pytest.approx(example[1].LENGTH)
    assert not example[1].features("", 64).any()


def test_rows_without_the_file_say_how_to_write_it(example, tmp_path):
    with pytest.raises(DataError, match=r"python examples/valence/make_data.py"):
        next(example[1].rows(file=str(tmp_path / "none.parquet")))
