"""Ray Data: shards of rows stream through teachers into the store."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

from raykd.console import Progress, say
from raykd.data import Dataset
from raykd.errors import DataError, RaykdError
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.open import address_below, open_place
from raykd.files.place import Place, read_json_in
from raykd.models.device import device_of
from raykd.orchestration.session import plain_error
from raykd.recipe.recipe import Recipe
from raykd.store import layer_signals
from raykd.store.commit import Shard, StoreWriter, plan_shards, store_id
from raykd.store.reader import Store
from raykd.teacher.identity import signals_of, store_identity
from raykd.teacher.scorer import Scorer, bad_rows
from raykd.teacher.statistics import store_statistics


class ShardScorer:
    """One actor of the pool: a teacher, loaded once, that scores and commits the shards it is
    given.
    """

    def __init__(self, recipe: Recipe, folder: str, wanted: dict[str, Any]):
        import torch

        torch.set_num_threads(1)
        self.scorer = Scorer(recipe)
        self.writers = layer_signals.writers(folder, wanted, signals_of(recipe))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of shard descriptors in; the rows scored, those that can not be, and seconds
        spent out.
        """
        rows, bad, seconds = [], [], []
        for values in zip(*(batch[k] for k in ("number", "split", "first", "last")), strict=True):
            started = time.process_time()
            number, split, first, last = values
            shard = Shard(int(number), str(split), int(first), int(last))
            table, unfit = self.scorer.score(shard)
            for name, part in layer_signals.split(table).items():
                if not self.writers[name].is_sound(shard):
                    self.writers[name].commit(shard, part, unfit)
            rows.append(table.num_rows)
            bad.append(len(unfit))
            seconds.append(time.process_time() - started)
        return {"rows": rows, "bad": bad, "seconds": seconds}


def home(recipe: Recipe, out: Path) -> Address:
    """Where a recipe's teacher stores stand side by side."""
    return recipe.scale.store or out / "stores"


def locate(recipe: Recipe, dataset: Dataset, out: Path) -> tuple[Address, dict[str, Any]]:
    """(address, identity) of the store that belongs to a recipe, whether or not it exists."""
    wanted = store_identity(recipe, dataset)
    return address_below(home(recipe, out), store_id(wanted)), wanted


def is_complete(where: Address, signals: list[str]) -> bool:
    """Whether a store and its signals are finished and their files stand as the manifests say."""
    store = open_place(where)
    return all(map(_is_whole, [store, *(layer_signals.place_of(store, name) for name in signals)]))


def _is_whole(place: Place) -> bool:
    manifest = read_json_in(place, "_MANIFEST.json")
    return manifest is not None and place.holds(manifest["shards"])


def score(recipe: Recipe, dataset: Dataset, out: Path) -> Address:
    """Score every row that is not yet in the store, finish it, and give its address. Needs a Ray
    session.

    DataError names the rows that can not be scored if they are more than `scale.max_bad_rows`; they
    are tried again by the next call.
    """
    say("score", dataset.describe())
    where, wanted = locate(recipe, dataset, out)
    shards = plan_shards(
        {n: len(r) for n, r in dataset.splits.items()}, recipe.store.rows_per_shard
    )
    writers = layer_signals.writers(where, wanted, signals_of(recipe))
    writer = writers[""]
    if len(writer.quarantined(shards)) > recipe.scale.max_bad_rows:
        for shard in shards:
            if writer.quarantined([shard]):
                writer.retract(shard)
    missing = {shard for each in writers.values() for shard in each.missing(shards)}
    if missing:
        _stream(recipe, writer, shards, sorted(missing, key=lambda shard: shard.number))
    # the statistics read the shards, so a provisional view stands in until the manifest exists
    writer.finish(
        shards, store_statistics(recipe, dataset, Store.of_shards(where, writer.records(shards)))
    )
    for name in signals_of(recipe):
        writers[name].finish(shards, {})
    return where


def _stream(recipe: Recipe, writer: StoreWriter, every: list[Shard], shards: list[Shard]) -> None:
    """Score `shards` of `every` shard of the store."""
    import ray.exceptions

    progress = Progress("score", sum(s.last - s.first for s in shards), "rows")
    done, bad, seconds = 0, len(writer.quarantined(every)), 0.0
    try:
        with (
            warnings.catch_warnings()
        ):  # Ray Data warns of its own defaults, and of the only way to bound retries
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray.")
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            for row in scored(recipe, writer, shards).iter_rows():
                done, seconds = done + int(row["rows"]), seconds + float(row["seconds"])
                progress.advance(done)
                bad += int(row["bad"])
                if bad > recipe.scale.max_bad_rows:
                    raise DataError(bad_rows(writer.quarantined(every), recipe.scale.max_bad_rows))
    except (RaykdError, ray.exceptions.RayError, RuntimeError) as error:
        raise plain_error(error, "score") from None
    timing = read_json_in(writer.place, "_TIMING.json") or {"seconds": 0.0}
    writer.place.put("_TIMING.json", to_json({"seconds": timing["seconds"] + seconds}))
    progress.finish()


def scored(
    recipe: Recipe, writer: StoreWriter, shards: list[Shard], actor: type[ShardScorer] = ShardScorer
) -> Any:
    """The Ray Data set of rows and seconds a shard, whose reading scores the shards."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    low, high = (min(size, len(shards)) for size in recipe.scale.scorers)
    tasks = max(
        min(len(shards), 8 * high), -(-len(shards) // 4)
    )  # a task costs Ray some 8 ms of the actor's CPU
    return ray.data.from_items([vars(s) for s in shards], override_num_blocks=tasks).map_batches(
        actor,
        fn_constructor_args=(recipe, str(writer.folder), writer.identity),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
        num_cpus=1,
        num_gpus=1 if device_of(recipe).type == "cuda" else 0,
        max_restarts=recipe.scale.retries,
        max_task_retries=recipe.scale.retries,
    )
