"""Laws of a split that is read in parts: the very batches of the split in memory, whatever its
parts and the store's shards are, and a training that is a function of its recipe.

The reference is DeviceRows, bit for bit.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import stored
import torch
import torch.distributed as dist
from child import start, wait
from parts import Cut
from safetensors.torch import load_file, save_file

from raykd import data
from raykd.errors import DataError, RecipeError, StoreError
from raykd.losses.terms import needs_of
from raykd.recipe.recipe import Recipe, Scale
from raykd.recipe.tables import Optim
from raykd.signals import Batch
from raykd.store.commit import Shard, StoreWriter
from raykd.store.reader import Store, read_shard
from raykd.targets import UNLABELLED
from raykd.teacher.head import teacher_head
from raykd.training.arm import World
from raykd.training.arms import arms_of
from raykd.training.checkpoints import Checkpoints
from raykd.training.device_rows import DeviceRows, to_device
from raykd.training.part_rows import PartRows
from raykd.training.run_arms import ArmRunner

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module", params=["fp16", "comb", "hidden"])
def scored(request, folder) -> tuple[Recipe, Store]:
    terms = {"kd": {"temperature": 2.0}, "future_valence": {}}
    return stored.scored(folder, request.param, terms=terms)


@pytest.fixture(scope="module")
def dense(folder) -> tuple[Recipe, Store]:
    return stored.scored(folder, "fp16")


def both(recipe: Recipe, store: Store | None, rows: int) -> tuple[PartRows, DeviceRows]:
    """A training split in parts of so many rows, and in memory."""
    dataset = data.load(recipe.data)
    needs = needs_of(recipe.terms)
    head = teacher_head(recipe, store, dataset) if store else None
    parts = PartRows(Cut(dataset, rows), "train", store, needs, CPU, head)
    return parts, to_device(dataset.splits["train"], "train", store, needs, CPU, head)


def assert_equal_batches(ours: Batch, theirs: Batch) -> None:
    for name in ("row_id", "inputs", "mask", "label", "valence", "saliency", "answer"):
        mine = getattr(ours, name)
        other = getattr(theirs, name)
        assert (mine is None) == (other is None), name
        assert mine is None or torch.equal(mine.nan_to_num(7), other.nan_to_num(7)), name
    assert (ours.teacher is None) == (theirs.teacher is None)
    if ours.teacher is not None and theirs.teacher is not None:
        assert torch.equal(ours.teacher.logits, theirs.teacher.logits)
        assert torch.equal(ours.teacher.mask, theirs.teacher.mask)
        assert (ours.teacher.valence is None) == (theirs.teacher.valence is None)
        assert ours.teacher.layers.keys() == theirs.teacher.layers.keys()
        for name, layer in ours.teacher.layers.items():
            assert torch.equal(layer, theirs.teacher.layers[name]), name
        if ours.teacher.valence is not None and theirs.teacher.valence is not None:
            assert torch.equal(ours.teacher.valence, theirs.teacher.valence)
    if ours.targets and theirs.targets:
        mine = ours.targets(2.0)
        other = theirs.targets(2.0)
        assert torch.equal(mine.ids, other.ids)
        assert torch.equal(mine.weight, other.weight)


@pytest.mark.parametrize("rows", [64, 50, 1000], ids=["shards", "across", "one"])
def test_any_rows_are_those_in_memory_whatever_the_parts(rows, scored):
    ours, theirs = both(*scored, rows)
    draw = np.random.default_rng(0)
    assert ours.teaches_logits == theirs.teaches_logits
    assert ours.row_shape == theirs.row_shape
    for size in (1, 32, 168):
        index = torch.from_numpy(draw.permutation(168)[:size])
        noise = torch.randn(size, *ours.row_shape)
        assert_equal_batches(ours.batch(index, noise), theirs.batch(index, noise))
    assert torch.equal(ours.saliency, theirs.saliency)


def test_rows_without_a_teacher_need_no_store(folder, dense):
    ours, theirs = both(dense[0], None, 50)
    index = torch.tensor([7, 0, 167])
    assert_equal_batches(ours.batch(index), theirs.batch(index))
    assert ours.saliency is None
    assert not ours.teaches_logits


def lacking(store: Store, out: Path, lost: set[int]) -> Store:
    """The store again without the answers to some rows, as scoring leaves them out."""
    writer = StoreWriter(out, store.manifest["identity"] | {"lacks": sorted(lost)})
    shards = []
    for record in store.manifest["shards"]:
        shard = Shard(*(record[name] for name in ("number", "split", "first", "last")))
        table = read_shard(store.place, record)
        ids = table.column("row_id").to_pylist()
        kept = table.filter(pa.array([row not in lost for row in ids]))
        writer.commit(shard, kept, {row: "lost" for row in ids if row in lost})
        shards.append(shard)
    writer.finish(shards, store.manifest["statistics"])
    return Store(out)


@pytest.mark.parametrize("rows", [64, 50])
def test_rows_that_could_not_be_scored_are_left_out(rows, dense, tmp_path):
    recipe, store = dense
    ids = data.load(recipe.data).splits["train"].row_id
    first_shard = set(ids[:64].tolist())
    for lost in ({int(ids[3]), int(ids[70]), int(ids[167])}, first_shard):
        without = lacking(store, tmp_path / str(len(lost)), lost)
        ours, theirs = both(recipe, without, rows)
        assert int(ours.sizes.sum()) == 168 - len(lost)
        index = torch.from_numpy(np.random.default_rng(0).permutation(168 - len(lost)))
        assert_equal_batches(ours.batch(index), theirs.batch(index))
        order = ours.order(Optim(batch=8, lanes=4), 0)
        epoch = np.concatenate([order.rows(step) for step in range(order.streams[0].walk.steps)])
        assert len(set(epoch.tolist())) == len(epoch)
        assert epoch.max() < 168 - len(lost)


def test_a_layer_of_the_teacher_is_read_from_a_volume_of_its_own(folder):
    raw = {"hint": {"pairs": [["blocks.0", "blocks.1"]]}, "kd": {"temperature": 2.0}}
    recipe, store = stored.scored(folder, "fp16", terms=raw)
    ours, theirs = both(recipe, store, 50)
    assert "hidden.blocks.1" in ours.signals
    index = torch.tensor([100, 3, 167, 64])
    assert_equal_batches(ours.batch(index), theirs.batch(index))


def test_other_rows_than_the_stores_are_refused(dense):
    recipe, store = dense
    rows = data.load(recipe.data).splits["train"]

    def opened(split) -> PartRows:
        dataset = data.load(recipe.data)
        other = replace(dataset, splits=dataset.splits | {"train": split})
        return PartRows(Cut(other, 64), "train", store, frozenset({"logits"}), CPU)

    with pytest.raises(StoreError, match="other rows than the data"):
        opened(rows.take(slice(1, None)))
    moved = replace(rows, row_id=rows.row_id + 1)
    with pytest.raises(StoreError, match="other rows than the data"):
        opened(moved).batch(torch.tensor([0, 100]))


def test_a_part_that_changed_since_it_was_listed_is_refused(dense):
    class Changed(Cut):
        def read(self, part):
            return super().read(part).take(slice(0, -1))

    dataset = data.load(dense[0].data)
    dataset = replace(dataset, classes=(*dataset.classes[:-1], "a name of its own"))
    rows = PartRows(Changed(dataset, 64), "train", None, frozenset(), CPU)
    with pytest.raises(DataError, match="63 rows, 63 with a label, where 64 and 64 were listed"):
        rows.batch(torch.tensor([0]))


def test_a_cache_too_small_for_the_lanes_is_refused_by_key(dense):
    source = Cut(data.load(dense[0].data), 16)
    rows = PartRows(source, "train", None, frozenset(), CPU, scale=Scale(cache_gb=3e-5))
    with pytest.raises(RecipeError, match=r"scale.cache_gb = 3e-05: a worker reads 11 parts"):
        rows.order(Optim(batch=32), 0)
    rows.order(Optim(batch=32, lanes=1, window=1), 0)


def test_a_term_that_reads_the_whole_split_is_refused_by_name(dense):
    ours, _ = both(*dense, 64)
    split = ours.batch(torch.tensor([0])).split
    with pytest.raises(RecipeError, match=r"reads 'answer' of the whole split.*negatives = 0"):
        assert split.answer


def hidden(recipe: Recipe) -> Cut:
    """The recipe's rows in parts, some of the first and all but ten of the others unlabelled."""
    dataset = data.load(recipe.data)
    train = dataset.splits["train"]
    keeps = np.isin(np.arange(len(train)) % 17, (0, 5))
    label = np.where(keeps, train.label, UNLABELLED)
    return Cut(replace(dataset, splits=dataset.splits | {"train": replace(train, label=label)}), 40)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_workers_share_has_its_part_of_the_labelled_rows(size, dense):
    source = hidden(dense[0])
    rows = PartRows(source, "train", None, frozenset(), CPU)
    order = rows.order(Optim(batch=20, lanes=5, labelled_share=0.5), 3)
    label = source.dataset.splits["train"].label
    for step in range(12):
        whole = order.rows(step)
        shares = [order.rows(step, World(rank, size).share(20)) for rank in range(size)]
        np.testing.assert_array_equal(np.concatenate(shares), whole)
        assert (label[whole] != UNLABELLED).sum() >= 10
        assert min((label[share] != UNLABELLED).sum() for share in shares) >= 10 // size
    labelled, _ = order.streams
    epochs = [labelled.rows(step, np.arange(10)) for step in range(2 * labelled.walk.steps)]
    assert (label[np.concatenate(epochs)] != UNLABELLED).all()


BLOCKS = {"steps": 30, "batch": 24, "evaluate_every": 10, "order": "blocks", "lanes": 6}


@pytest.fixture(scope="module")
def taught(folder) -> tuple[Recipe, Store]:
    """A recipe in blocks, with weights of rows and hidden labels, and its store."""
    return stored.scored(
        folder,
        "fp16",
        terms={"kd": {"temperature": 2.0}, "ce": {}},
        weighting={"mode": "ess"},
        optim=BLOCKS | {"input_noise": 0.05},
        scale={"readers": 2, "checkpoint_every": 10},
        data={"source": str(folder / "rows"), "label_fraction": 0.3},
    )


def run(recipe: Recipe, store: Path, **keywords: Any) -> dict[str, torch.Tensor]:
    """The weights of the student, trained on parts of 40 rows beside shards of 64."""
    source = Cut(data.load(recipe.data), 40)
    shop = ArmRunner(recipe, store, CPU, source=source)
    arm = next(arm for arm in arms_of(recipe) if arm.name == "student")
    state = shop.train_arm(arm, shop.student(arm), **keywords)
    return state.learner.student.module.state_dict()


def train_on(rank: int, size: int, meeting: Path, out: Path, recipe: Recipe, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    save_file(run(recipe, store, world=World(rank, size)), out / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_workers_on_parts_train_as_one(taught, tmp_path):
    """The difference is that of other orders of sums in float32, as in tests of the loop."""
    recipe, store = taught
    arguments = (tmp_path / "meeting", tmp_path, recipe, store.folder)
    workers = [start(train_on, rank, 2, *arguments) for rank in range(2)]
    alone = run(recipe, store.folder)
    assert wait(workers) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        if not name.endswith("qkv.bias"):  # whose true gradient is zero
            torch.testing.assert_close(first[name], value, rtol=0, atol=6e-6)


def test_a_run_on_parts_that_was_killed_ends_with_the_same_bits(taught, tmp_path):
    recipe, store = taught

    def die(step: int, _: dict[str, Any]) -> None:
        if step == 20:
            raise KeyboardInterrupt

    kept = {"checkpoints": Checkpoints(tmp_path), "checkpoint_every": 10}
    with pytest.raises(KeyboardInterrupt):
        run(recipe, store.folder, report=die, **kept)
    resumed = run(recipe, store.folder, **kept)
    alone = run(recipe, store.folder)
    assert all(torch.equal(resumed[name], value) for name, value in alone.items())
