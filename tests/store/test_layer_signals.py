"""A store is extended, never written again: one more layer is one more store below it, of the same
rows.

The reference is the teacher's own layer, and the bytes that stood before.
"""

import by_hand
import numpy as np
import pytest
import torch

from raykd import data
from raykd.errors import StoreError
from raykd.losses.terms import TERMS, TermValues, term
from raykd.stages.load import resolve
from raykd.store import care, layer_signals
from raykd.store.reader import Store
from raykd.training.device_rows import to_device

LAYER = "hidden.blocks.0"


@pytest.fixture(scope="module", autouse=True)
def reading_a_layer():
    """A term that reads an inner layer, for this file alone."""

    @term("logits", LAYER)
    def reads_a_layer(student, batch) -> TermValues:
        return TermValues(student.logits.sum(-1) * 0, student.mask)

    yield
    del TERMS["reads_a_layer"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """(a recipe without the layer, the same with it), and the folder for their stores."""
    folder = tmp_path_factory.mktemp("layers")
    table = by_hand.teacher(folder / "teacher.safetensors")
    raw = {"teacher": table, "data": {"stride": 200}, "store": {"rows_per_shard": 100, "batch": 64}}
    plain = resolve(raw | {"terms": {"kd": {}}})
    return plain, resolve(raw | {"terms": {"kd": {}, "reads_a_layer": {}}}), folder


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_extended_store_keeps_every_byte_and_gains_the_layer(recipes):
    plain, reading, folder = recipes
    store = by_hand.score(plain, folder / "stores")
    before = content(store)
    with pytest.raises(StoreError, match=r"holds no 'hidden.blocks.0'"):
        Store(store).column(LAYER, "train")
    assert by_hand.score(reading, folder / "stores") == store, (
        "one teacher and one data set have one store"
    )
    after = content(store)
    assert {path: after[path] for path in before} == before
    assert {path.parts[0] for path in after.keys() - before.keys()} == {layer_signals.FOLDER}

    scorer, dataset = by_hand.scorer_of(reading)
    rows = dataset.splits["val"]
    with torch.inference_mode():
        live = scorer.teacher(torch.from_numpy(rows.inputs), torch.from_numpy(rows.mask)).layers[
            "hidden.blocks.0"
        ]
    kept = to_device(rows, "val", Store(store), frozenset({"logits", LAYER}), torch.device("cpu"))
    read = kept.batch(torch.arange(len(rows))).teacher
    assert read is not None
    assert torch.allclose(
        read.layers["hidden.blocks.0"].float(), live, atol=2**-9 * float(live.abs().max())
    )


def test_an_extended_store_is_cared_for_as_a_whole(recipes):
    _, reading, folder = recipes
    store = by_hand.score(reading, folder / "cared")
    assert care.verify(store) == {
        "complete": True,
        "shards": 2 * len(Store(store).manifest["shards"]),
        "damaged": [],
    }
    assert LAYER in care.show(store)["columns"]
    assert care.gc(store, older_than_s=0, force=True) == []
    path = next((store / layer_signals.FOLDER / LAYER / "data").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    (damage,) = care.verify(store)["damaged"]
    assert damage["file"] == f"{layer_signals.FOLDER}/{LAYER}/data/{path.name}"
    assert care.repair(store) == [damage["file"]]
    by_hand.score(reading, folder / "cared")
    assert path.read_bytes() == whole
    assert np.array_equal(
        Store(store).row_id("test"), data.load(reading.data).splits["test"].row_id
    )
