"""Ray Data: shards of rows stream through teachers into the store.

The rows lie once in the object store of a node. One actor cuts shards out of them, and the blocks
flow to the teachers' actors as fast as those take them. A teacher's actor gets a header, never the
data set.
"""

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from raykd.console import Progress, say
from raykd.data import Dataset, Rows
from raykd.errors import DataError, RaykdError
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.open import address_below, open_place
from raykd.orchestration.cluster import check_seen, placed
from raykd.orchestration.session import at_node, plain_error
from raykd.recipe import imports
from raykd.recipe.recipe import Recipe
from raykd.store import layer_signals
from raykd.store.commit import Shard, StoreWriter, plan_shards, store_id
from raykd.store.manifest import seconds_of
from raykd.store.reader import Store
from raykd.teacher.identity import signals_of, store_identity
from raykd.teacher.scorer import Header, Scorer, bad_rows
from raykd.teacher.statistics import store_statistics


def block_of(rows: Rows, shard: Shard) -> dict[str, Any]:
    """A line for each row of a shard: the arrays of `Rows`, and of which shard the row is."""
    arrays: dict[str, Any] = {name: v for name, v in vars(rows).items() if v is not None}
    for name, value in vars(shard).items():
        arrays[name] = np.repeat(np.array([value]), len(rows))
    return arrays


class ShardRows:
    """An actor that cuts shards out of the rows of the object store.

    It takes no CPU for itself. Tasks would, in effect: where teachers have all CPUs of a node, Ray
    ends idle processes, and starts a new one for the next task.
    """

    def __init__(self, splits: Mapping[str, Any]):
        self.splits = splits  # references to the Rows of each split

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One shard's descriptor in, its block out."""
        import ray

        shard = _shard_of(batch)
        rows: Any = ray.get(self.splits[shard.split])
        return block_of(rows.take(slice(shard.first, shard.last)), shard)


class ShardActor:
    """One actor of the pool: a teacher, loaded once, that scores and commits shards."""

    def __init__(self, recipe: Recipe, header: Header, folder: str, wanted: dict[str, Any]):
        import torch

        torch.set_num_threads(1)
        self.fault: RaykdError | None = None
        try:
            imports.permit(recipe.packages)
            store = open_place(folder).address
            if isinstance(store, Path):
                check_seen(store)
            self.scorer = Scorer(recipe, header)
            self.writers = layer_signals.writers(folder, wanted, signals_of(recipe))
        except RaykdError as fault:  # an actor whose start fails is started again
            self.fault = at_node(fault)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The block of a shard in.

        Out come how many were scored, how many cannot be, and the CPU seconds spent.
        """
        if self.fault:
            raise self.fault
        try:
            return self._score(batch)
        except RaykdError as fault:
            raise at_node(fault) from None

    def _score(self, batch: dict[str, Any]) -> dict[str, Any]:
        started = time.process_time()
        shard = _shard_of(batch)
        names = [field.name for field in fields(Rows)]
        rows = Rows(**{name: batch[name] for name in names if name in batch})
        assert len(rows) == shard.last - shard.first, "a block is a shard"
        table, unfit = self.scorer.score(rows)
        for name, columns_of_layer in layer_signals.split(table).items():
            if not self.writers[name].is_sound(shard):
                self.writers[name].commit(shard, columns_of_layer, unfit)
        seconds = time.process_time() - started
        return {"rows": [table.num_rows], "bad": [len(unfit)], "seconds": [seconds]}


def _shard_of(batch: Mapping[str, Any]) -> Shard:
    """The shard that a batch is of."""
    first = {name: batch[name][0] for name in ("number", "split", "first", "last")}
    return Shard(int(first["number"]), str(first["split"]), int(first["first"]), int(first["last"]))


def stores_address(recipe: Recipe, out: Path) -> Address:
    """The address under which a recipe's teacher stores lie side by side."""
    return recipe.scale.store or out / "stores"


def locate(recipe: Recipe, dataset: Dataset, out: Path) -> tuple[Address, dict[str, Any]]:
    """(address, identity) of the store that belongs to a recipe, whether or not it exists."""
    identity = store_identity(recipe, dataset)
    address = address_below(stores_address(recipe, out), store_id(identity))
    return address, identity


def is_complete(where: Address, signals: list[str]) -> bool:
    """Whether a store and its signals are finished, and their files are as the manifests say.

    StoreError if a manifest is damaged, or of another store than the address names.
    """
    place = open_place(where)
    layers = [layer_signals.place_of(place, name) for name in signals]
    if any(each.get("_MANIFEST.json") is None for each in (place, *layers)):
        return False
    store = Store(place)
    stores = [store, *map(store.layer, signals)]
    return all(each.place.holds(each.manifest["shards"]) for each in stores)


def score(recipe: Recipe, dataset: Dataset, out: Path) -> Address:
    """Score every row that is not yet in the store, finish the store, and give its address.

    Needs a Ray session. DataError names the rows that cannot be scored if they are more than
    `scale.max_bad_rows`; the next call tries them again.
    """
    say("score", dataset.describe())
    address, identity = locate(recipe, dataset, out)
    sizes = {name: len(rows) for name, rows in dataset.splits.items()}
    shards = plan_shards(sizes, recipe.store.rows_per_shard)
    writers = layer_signals.writers(address, identity, signals_of(recipe))
    writer = writers[""]
    if len(writer.quarantined(shards)) > recipe.scale.max_bad_rows:
        for shard in shards:
            if writer.quarantined([shard]):
                writer.retract(shard)
    missing: set[Shard] = set()
    for layer_writer in writers.values():
        missing.update(layer_writer.missing(shards))
    if missing:
        in_order = sorted(missing, key=lambda shard: shard.number)
        _score_missing(recipe, dataset, writer, shards, missing=in_order)
    # the statistics read the shards, so a provisional view serves until the manifest exists
    provisional = Store.of_shards(address, writer.records(shards))
    writer.finish(shards, store_statistics(recipe, dataset, provisional))
    for name in signals_of(recipe):
        writers[name].finish(shards, {})
    return address


def _score_missing(
    recipe: Recipe,
    dataset: Dataset,
    writer: StoreWriter,
    shards: list[Shard],
    *,
    missing: list[Shard],
) -> None:
    """Score the missing ones of all shards of a store."""
    import ray.exceptions

    progress = Progress("score", sum(shard.last - shard.first for shard in missing), "rows")
    done = 0
    bad = len(writer.quarantined(shards))
    seconds = 0.0
    try:
        with warnings.catch_warnings():
            # Ray Data warns of its own defaults, and of the only way to bound retries
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray.")
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            for row in shard_results(recipe, dataset, writer, missing).iter_rows():
                done += int(row["rows"])
                seconds += float(row["seconds"])
                progress.advance(done)
                bad += int(row["bad"])
                if bad > recipe.scale.max_bad_rows:
                    quarantined = writer.quarantined(shards)
                    raise DataError(bad_rows(quarantined, recipe.scale.max_bad_rows))
    except (RaykdError, ray.exceptions.RayError, RuntimeError) as error:
        raise plain_error(error, "score") from None
    before = seconds_of(writer.place) or 0.0
    writer.place.put("_TIMING.json", to_json({"seconds": before + seconds}))
    progress.finish()


def shard_results(
    recipe: Recipe,
    dataset: Dataset,
    writer: StoreWriter,
    shards: list[Shard],
    actor: type[ShardActor] = ShardActor,
) -> Any:
    """The Ray Data set of what `actor` gives of each shard; reading it scores the shards."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None
    context.target_max_block_size = None  # a block is a shard
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    header = Header.of(recipe, dataset)
    recipe = placed(recipe)
    low, high = (min(size, len(shards)) for size in recipe.scale.scorers)
    splits = {split: ray.put(dataset.splits[split]) for split in {shard.split for shard in shards}}
    descriptors = ray.data.from_items(
        [vars(shard) for shard in shards], override_num_blocks=len(shards)
    )
    blocks = descriptors.map_batches(
        ShardRows,
        fn_constructor_args=(splits,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    return blocks.map_batches(
        actor,
        fn_constructor_args=(recipe, header, str(writer.folder), writer.identity),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
        num_cpus=1,
        num_gpus=1 if recipe.scale.device == "cuda" else 0,
        max_restarts=recipe.scale.retries,
        # Tasks of a lost node fail many times a second until Ray knows that it is dead; its actors
        # are then started elsewhere, and how often that may be is bounded above.
        max_task_retries=-1,
    )
