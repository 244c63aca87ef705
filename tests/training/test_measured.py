"""Laws of what is measured of a split: neither its parts nor the ranks that share it change what is
said of a row, or any sum.

The reference is the split in memory.
"""

import threading
from dataclasses import dataclass, replace
from itertools import pairwise

import by_hand
import numpy as np
import pyarrow.parquet as pq
import pytest
import stored
import texts
import torch
from parts import Cut
from torch import Tensor

from raykd import data
from raykd.data import Dataset, Rows, table
from raykd.data.table import Held, Part, RowsDigest, Table, after, in_memory
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.stages.load import load, resolve
from raykd.store.reader import Store
from raykd.targets import UNLABELLED
from raykd.training import measured, predictions
from raykd.training.arm import World
from raykd.training.measured import PartSplit, dealt, join, runs, tally, write
from raykd.training.predictions import Predictions

CPU = torch.device("cpu")
ABSENT = 4  # a class that no row of the split has


@pytest.fixture(autouse=True)
def small_calls(monkeypatch, tmp_path):
    """Rows in calls of 32, in a cache of their own."""
    monkeypatch.setattr(predictions, "EVAL_BATCH", 32)
    monkeypatch.setenv("RAYKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Series of 280 test rows, of which some have no label and none is of class ABSENT."""
    made = stored.write(tmp_path_factory.mktemp("rows"))
    found = data.load(resolve({"technique": "none", "data": {"source": str(made / "rows")}}).data)
    whole = [found.splits[name] for name in ("train", "val", "test")]
    pieces = [rows.take(np.flatnonzero(rows.label != ABSENT)) for rows in whole]
    rows = measured_rows(pieces)
    label = rows.label.copy()
    label[::9] = UNLABELLED
    return replace(found, splits=found.splits | {"test": replace(rows, label=label)})


def measured_rows(pieces: list[Rows]) -> Rows:
    arrays = {
        name: np.concatenate([getattr(rows, name) for rows in pieces])
        for name, values in vars(pieces[0]).items()
        if values is not None
    }
    return Rows(**arrays).take(np.argsort(arrays["row_id"]))


@pytest.fixture(scope="module")
def student() -> Adapter:
    torch.manual_seed(0)
    return Adapter(SeriesEncoder(channels=6, classes=stored.CLASSES, steps=16, width=8, layers=1))


@dataclass(frozen=True)
class WithEmptyParts(Cut):
    """The same with a part of no rows before, within and behind those of each split."""

    def table(self) -> Table:
        parts: list[Part] = []
        for part in super().table().parts:
            if part.group < 2:
                parts.append(part._replace(number=len(parts), rows=0, labelled=0, group=-1))
            parts.append(part._replace(number=len(parts)))
        parts.append(parts[-1]._replace(number=len(parts), rows=0, labelled=0, group=-1))
        return replace(super().table(), parts=tuple(parts))

    def read(self, part: Part) -> Rows:
        if part.group < 0:
            return self.dataset.splits[part.split].take(slice(0, 0))
        return super().read(part)


class OneOf(World):
    """A rank in a thread of this process."""

    def __init__(self, rank: int, size: int, told: list[Tensor], barrier: threading.Barrier):
        super().__init__(rank, size)
        object.__setattr__(self, "told", told)
        object.__setattr__(self, "barrier", barrier)

    def sum(self, values: Tensor) -> Tensor:
        self.told.append(values)
        self.barrier.wait()
        return torch.stack(self.told).sum(0)


def by_ranks(size: int, work) -> list:
    """What `work(world)` gives on each of so many ranks at once."""
    told: list[Tensor] = []
    barrier = threading.Barrier(size)
    worlds = [OneOf(rank, size, told, barrier) for rank in range(size)]
    found: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda w=world: found.update({w.rank: work(w)})) for world in worlds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def split_of(source, store: Store | None = None, head=None):
    return measured.measured(source, "test", store, CPU, head)


def test_parts_say_of_each_row_what_rows_in_memory_say(dataset, student, tmp_path):
    held = split_of(Held(dataset)).said(student, 0)
    assert held.logits is not None
    for rows in (7, 64, 1000):
        split = split_of(WithEmptyParts(dataset, rows))
        assert split.pieces > 7
        path = tmp_path / f"{rows}.parquet"
        write(student, split, path)
        said = predictions.read(path)
        split.close()
        for name in ("place", "label", "answer", "log_q"):
            np.testing.assert_array_equal(getattr(said, name), getattr(held, name))
        assert said.logits is None


def test_sums_are_equal_for_any_parts_and_ranks(dataset, student):
    held = tally(student, split_of(Held(dataset))).metrics()
    assert held == split_of(Held(dataset)).said(student, 0).metrics()
    found = []
    for rows in (7, 64):
        for size in (1, 2, 3, 12):
            splits = [split_of(WithEmptyParts(dataset, rows)) for _ in range(size)]
            found += by_ranks(size, lambda w, s=splits: tally(student, s[w.rank], w).metrics())
            for split in splits:
                split.close()
    assert all(metrics == found[0] for metrics in found)
    assert found[0] == pytest.approx(held, rel=1e-12)
    assert found[0]["accuracy"] == held["accuracy"]
    assert found[0]["macro_f1"] == held["macro_f1"]
    assert by_ranks(3, lambda w: tally(student, split_of(Held(dataset)), w).metrics()) == [held] * 3


def test_ranks_write_one_file_together(dataset, student, tmp_path):
    alone = tmp_path / "alone.parquet"
    write(student, split_of(Cut(dataset, 50)), alone)
    for size in (2, 3, 12):
        path = tmp_path / "together.parquet"
        by_ranks(size, lambda w, p=path: write(student, split_of(Cut(dataset, 50)), p, w))
        join(path, World(0, size))
        assert path.read_bytes() == alone.read_bytes()
        assert not list(tmp_path.glob("together-*"))
    whole = tmp_path / "held.parquet"
    by_ranks(2, lambda w: write(student, split_of(Held(dataset)), whole, w))
    join(whole, World(0, 2))
    split_of(Held(dataset)).said(student, 0).write(alone)
    assert whole.read_bytes() == alone.read_bytes()


def test_a_share_that_was_left_by_more_ranks_is_not_joined(dataset, student, tmp_path):
    path = tmp_path / "said.parquet"
    by_ranks(3, lambda w: write(student, split_of(Cut(dataset, 50)), path, w))
    by_ranks(2, lambda w: write(student, split_of(Cut(dataset, 50)), path, w))
    join(path, World(0, 2))
    assert len(pq.read_table(path)) == len(dataset.splits["test"])


def test_a_failed_evaluation_leaves_the_file_before_it(dataset, student, tmp_path, monkeypatch):
    path = tmp_path / "said.parquet"
    path.write_bytes(b"before")
    split = split_of(Held(dataset))
    monkeypatch.setattr(Predictions, "table", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(student, split, path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.glob("*.parquet*")] == ["said.parquet"]


@pytest.mark.parametrize("pieces", [0, 1, 5, 64])
def test_every_piece_is_dealt_to_one_rank(pieces):
    for size in (1, 2, 3, 7, 64):
        shares = [dealt(pieces, World(rank, size)) for rank in range(size)]
        assert [piece for share in shares for piece in share] == list(range(pieces))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_told_of_a_split_is_read_by_part(dataset):
    whole = predictions.TestPlaces.of(dataset.splits["test"])
    digests = set()
    for rows in (7, 64, 1000):
        source = WithEmptyParts(dataset, rows)
        digest = RowsDigest(dataset.classes)
        read = predictions.TestPlaces.of_source(source, "test", digest.add)
        for name, values in vars(read).items():
            np.testing.assert_array_equal(values, getattr(whole, name))
        digests.add(digest.hexdigest())
    assert len(digests) == 1
    label = dataset.splits["test"].label.copy()
    label[1] = UNLABELLED
    digest = RowsDigest(dataset.classes)
    digest.add(replace(dataset.splits["test"], label=label))
    assert digest.hexdigest() not in digests


@pytest.mark.parametrize("most", [1, 20, 64, 4096])
def test_the_first_rows_are_in_memory_and_the_others_come_by_part(dataset, most, monkeypatch):
    monkeypatch.setattr(table, "SAMPLE_ROWS", most)
    whole = dataset.splits["test"]
    for rows in (7, 64, 1000):
        source = WithEmptyParts(dataset, rows)
        first = in_memory(source).splits["test"]
        assert len(first) == min(most, len(whole))
        others = list(after(source, "test", len(first)))
        assert all(len(rest) <= rows for rest in others)
        row_id = np.concatenate([one.row_id for one in [first, *others]])
        np.testing.assert_array_equal(row_id, whole.row_id)
    monkeypatch.setattr(table, "SAMPLE_BYTES", 1)
    assert len(in_memory(Cut(dataset, 7)).splits["test"]) == min(most, 7)


def test_rows_of_text_are_read_by_tokens():
    draw = np.random.default_rng(0)
    for most in (1, 10, 100, 10_000):
        length = draw.integers(1, 30, 50)
        calls = list(runs(length, most))
        assert [first for first, _ in calls] == [0, *(last for _, last in calls)][:-1]
        assert calls[-1][1] == 50
        sizes = [(last - first) * length[first:last].max() for first, last in calls]
        alone = [last - first == 1 for first, last in calls]
        assert all(one or size <= most for one, size in zip(alone, sizes, strict=True))
        for (first, last), (_, end) in pairwise(calls):
            assert (last + 1 - first) * length[first : last + 1].max() > most or end == last


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small language, its rows, and the store of its teacher."""
    home = tmp_path_factory.mktemp("text")
    recipe = load(str(texts.recipe(home, texts.tokenizer(home))))
    source = data.open_source(recipe.data)
    assert isinstance(source, Held)
    return source.dataset, Store(by_hand.score(recipe, home / "stores"))


def test_text_in_parts_is_text_in_memory(text, monkeypatch, tmp_path):
    dataset, store = text
    monkeypatch.setattr(measured, "PIECE_TOKENS", 10 * texts.STEPS)
    monkeypatch.setattr(measured, "CALL_TOKENS", 3 * texts.STEPS)
    torch.manual_seed(0)
    shape = {"classes": len(dataset.classes), "steps": texts.STEPS}
    student = Adapter(Llama(**shape, width=16, layers=1, heads=2, kv_heads=1))
    held = split_of(Held(dataset), store)
    whole = held.said(student, 0)
    assert whole.kl is not None
    for rows in (7, 1000):
        split = split_of(Cut(dataset, rows), store)
        assert isinstance(split, PartSplit)
        assert split.pieces > 2
        path = tmp_path / "said.parquet"
        write(student, split, path)
        said = predictions.read(path)
        np.testing.assert_array_equal(said.place, whole.place)
        np.testing.assert_array_equal(said.label, whole.label)
        assert (said.answer == whole.answer).mean() > 0.99
        np.testing.assert_allclose(said.log_q, whole.log_q, atol=1e-5)
        np.testing.assert_allclose(said.kl, whole.kl, atol=1e-4)
        found = tally(student, split).metrics()
        assert found == pytest.approx(whole.metrics(), abs=2e-3)
        assert found.keys() == whole.metrics().keys() == {"accuracy", "nll", "kl"}
        split.close()
