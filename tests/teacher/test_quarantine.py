"""Laws of rows that a teacher cannot score: told by id and reason, left out or refused, and
nothing else changes.

The reference is the store of the same teacher when it answers for every row.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import stored
import torch

from raykd import data
from raykd.data.table import Held
from raykd.errors import DataError
from raykd.orchestration import scoring
from raykd.recipe.recipe import Recipe
from raykd.store import care
from raykd.store.commit import StoreWriter, plan_shards
from raykd.store.reader import Store
from raykd.teacher.scorer import Header, Scorer, bad_rows
from raykd.teacher.statistics import store_statistics
from raykd.training.arms import arms_of
from raykd.training.device_rows import to_device
from raykd.training.run_arms import ArmRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


CPU = torch.device("cpu")


class Poisoned(Scorer):
    """A scorer whose teacher answers NaN for some rows, and beyond fp16 for others."""

    nan: tuple[int, ...] = ()
    large: tuple[int, ...] = ()

    def __init__(self, recipe: Recipe, header: Header):
        super().__init__(recipe, header)
        # type: ignore[assignment]
        self.sound = self.teacher
        self.teacher = self._answer

    def _forward(self, rows):
        self.ids = rows.row_id
        return super()._forward(rows)

    def _answer(self, inputs, mask):
        signals = self.sound(inputs, mask)
        logits = signals.logits.clone()
        logits[np.isin(self.ids, self.nan)] = torch.nan
        logits[np.isin(self.ids, self.large)] = 1e6
        return replace(signals, logits=logits)


def poisoned(
    recipe: Recipe, out: Path, nan: tuple[int, ...], large: tuple[int, ...] = ()
) -> tuple[Path, Any, Any]:
    """(the store of a teacher that cannot score some rows, its writer, its shards)."""
    scorer, dataset = by_hand.scorer_of(recipe, Poisoned)
    scorer.nan = nan
    scorer.large = large
    where, wanted = scoring.locate(recipe, dataset, out)
    writer = StoreWriter(where, wanted)
    sizes = {name: len(rows) for name, rows in dataset.splits.items()}
    shards = plan_shards(sizes, recipe.store.rows_per_shard)
    for shard in shards:
        writer.commit(shard, *scorer.score(by_hand.rows_of(dataset, shard)))
    kept = Store.of_shards(where, writer.records(shards))
    writer.finish(shards, store_statistics(recipe, Held(dataset), kept))
    return where, writer, shards


@pytest.mark.parametrize("codec", ["fp16", "comb"])
def test_rows_that_can_not_be_scored_are_left_out_with_the_reason(codec, folder, tmp_path):
    recipe, whole = stored.scored(folder, codec)
    splits = data.load(recipe.data).splits
    train = splits["train"].row_id
    test = splits["test"].row_id
    lost = {int(train[3]), int(train[70]), int(test[5])}
    large = (int(train[9]),) if codec == "fp16" else ()
    where, writer, shards = poisoned(recipe, tmp_path, tuple(lost), large)
    told = writer.quarantined(shards)
    assert told.keys() == lost | set(large)
    assert {told[i] for i in lost} == {"NaN or infinite logits"}
    assert all("fp16" in told[i] for i in large)
    assert writer.missing(shards) == []
    assert care.verify(where)["complete"]
    assert {row["row_id"] for row in care.show(where)["quarantined"]} == told.keys()
    assert f"row {int(train[3])}: NaN" in bad_rows(told, 0)
    store = Store(where)
    fit = ~np.isin(train, list(told))
    assert np.array_equal(store.row_id("train"), train[fit])
    ours = to_device(splits["train"], "train", store, frozenset({"logits"}), CPU)
    theirs = to_device(splits["train"], "train", whole, frozenset({"logits"}), CPU)
    at = torch.from_numpy(np.flatnonzero(fit))
    index = torch.tensor([0, 3, 60, len(at) - 1])
    a = ours.batch(index)
    b = theirs.batch(at[index])
    for name in ("row_id", "inputs", "mask", "label"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    logits = [x.targets(2.0).dense() if x.targets else x.teacher.logits for x in (a, b)]
    assert torch.equal(*logits)
    aligned = store.aligned("answer", "test", test, -1)
    assert np.flatnonzero(aligned == -1).tolist() == [5]
    shop = ArmRunner(recipe, where, CPU)
    arm = next(x for x in arms_of(recipe) if x.name == "student")
    assert np.isfinite(shop.train_arm(arm, shop.student(arm)).history[-1]["loss"])


def test_a_shard_whose_reasons_are_lost_is_scored_again(folder, tmp_path):
    recipe, _ = stored.scored(folder, "fp16")
    first = int(data.load(recipe.data).splits["train"].row_id[0])
    where, writer, shards = poisoned(recipe, tmp_path, (first,))
    (where / "_quarantine/00000.json").unlink()
    assert "without a reason" in care.verify(where)["damaged"][0]["fault"]
    assert writer.missing(shards) == shards[:1]
    assert not (where / "_commits/00000.json").exists()


def test_a_shard_without_any_row_that_can_be_scored_is_sound(folder, tmp_path):
    recipe, _ = stored.scored(folder, "comb")
    every = data.load(recipe.data).splits["train"].row_id
    size = recipe.store.rows_per_shard
    where, writer, shards = poisoned(recipe, tmp_path, tuple(every[:size].tolist()))
    assert Store(where).table("train").num_rows == len(every) - size
    assert writer.missing(shards) == []


def test_a_row_that_can_not_be_scored_is_an_error_unless_it_is_allowed(folder):
    recipe, _ = stored.scored(folder, "fp16")
    scorer, dataset = by_hand.scorer_of(recipe, Poisoned)
    rows = dataset.splits["val"]
    ids = rows.row_id
    scorer.nan = (int(ids[1]),)
    with pytest.raises(DataError, match=rf"row {ids[1]}: NaN or infinite logits"):
        scorer.table(rows)


class OneProcess:
    """Ray's data set of scored shards, its only actor in this process."""

    def __init__(self, recipe, source, writer, shards):
        header = Header.of(recipe, source.table())
        self.actor = scoring.ShardActor(recipe, header, str(writer.folder), writer.identity)
        self.dataset = source.dataset
        self.shards = shards

    def iter_rows(self):
        for shard in self.shards:
            block = scoring.block_of(by_hand.rows_of(self.dataset, shard), shard)
            yield {name: values[0] for name, values in self.actor(block).items()}


def test_more_bad_rows_than_allowed_fail_the_stage_and_are_tried_again(
    folder, tmp_path, monkeypatch
):
    recipe, whole = stored.scored(folder, "fp16")
    dataset = data.load(recipe.data)
    ids = dataset.splits["train"].row_id
    monkeypatch.setattr(scoring, "shard_results", OneProcess)
    monkeypatch.setattr(scoring, "Scorer", Poisoned)
    monkeypatch.setattr(Poisoned, "nan", (int(ids[2]), int(ids[80])))
    with pytest.raises(
        DataError, match=rf"cannot score 1 rows, scale.max_bad_rows allows 0:\n  row {ids[2]}: NaN"
    ):
        scoring.score(recipe, Held(dataset), tmp_path)
    allowed = recipe.model_copy(
        update={"scale": recipe.scale.model_copy(update={"max_bad_rows": 1})}
    )
    with pytest.raises(
        DataError, match=rf"(?s)cannot score 2 rows.* row {ids[2]}: .* row {ids[80]}: "
    ):
        scoring.score(allowed, Held(dataset), tmp_path)
    where, _ = scoring.locate(recipe, dataset, tmp_path)
    assert not (where / "_MANIFEST.json").exists()
    monkeypatch.setattr(Poisoned, "nan", (int(ids[2]),))
    scoring.score(allowed, Held(dataset), tmp_path)
    assert Store(where).unscored("train") == 1
    assert scoring.is_complete(where, [])
    (where / "_MANIFEST.json").unlink()
    monkeypatch.setattr(Poisoned, "nan", ())
    scoring.score(recipe, Held(dataset), tmp_path)
    assert (where / "_MANIFEST.json").read_bytes() == (whole.folder / "_MANIFEST.json").read_bytes()


@pytest.mark.parametrize("codec", stored.CODECS)
def test_what_is_encoded_beside_the_next_forward_is_what_is_encoded_before_it(
    folder, codec, monkeypatch
):
    recipe, _ = stored.scored(folder, codec)
    scorer, dataset = by_hand.scorer_of(recipe)
    rows = dataset.splits["train"]
    assert len(rows) > 3 * recipe.store.batch
    beside = scorer.table(rows)
    monkeypatch.setattr("raykd.teacher.scorer.BESIDE_BYTES", 0)
    assert scorer.table(rows).equals(beside)


def test_a_fault_of_the_encoding_thread_is_the_scorers(folder):
    recipe, _ = stored.scored(folder, "fp16")
    scorer, dataset = by_hand.scorer_of(recipe)

    def fails(*args: Any) -> Any:
        raise DataError("this batch cannot be encoded")

    scorer.codec = replace(scorer.codec)
    object.__setattr__(scorer.codec, "encode", fails)
    with pytest.raises(DataError, match="this batch"):
        scorer.table(dataset.splits["train"])
