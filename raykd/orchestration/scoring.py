"""Ray Data: shards of rows stream through teachers into the store.

Actors read shards of rows, and the blocks flow to the teachers' actors as fast as those take
them. A block is a shard, or the shards of one part where rows are read in parts, so that a part is
read once. Rows that are in memory lie once in the object store of a node. A teacher's actor gets a
header, never the data set.
"""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.console import Progress, say
from raykd.data import Part, Rows, Table
from raykd.data.rows import Facts
from raykd.data.table import Source
from raykd.errors import DataError, RaykdError, StoreError
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.open import address_below, open_place
from raykd.files.place import holds
from raykd.files.waiting import in_turn
from raykd.orchestration.cluster import check_seen, placed
from raykd.orchestration.patience import Patience
from raykd.orchestration.session import at_node, plain_error
from raykd.recipe import imports
from raykd.recipe.recipe import Recipe
from raykd.store import layer_signals
from raykd.store.commit import Shard, StoreWriter, plan_shards, store_id
from raykd.store.manifest import read_manifest, seconds_of
from raykd.store.reader import Store, read_shard
from raykd.store.shard_records import ShardRecords
from raykd.teacher.identity import check_teacher, signals_of, store_identity
from raykd.teacher.scorer import Header, Scorer, bad_rows
from raykd.teacher.statistics import store_statistics, summed_statistics
from raykd.teacher.sums import Sums, sums_of, total

LISTERS = 8  # small files that are read at a time
FED = 4  # teachers that one reader has rows for


def block_of(rows: Rows, shard: Shard) -> dict[str, Any]:
    """A line for each row of a shard: the arrays of `Rows`, and of which shard the row is."""
    arrays: dict[str, Any] = {name: v for name, v in vars(rows).items() if v is not None}
    for name, value in asdict(shard).items():
        arrays[name] = np.repeat(np.array([value]), len(rows))
    return arrays


@dataclass(frozen=True)
class Lent:
    """Rows of the driver's memory as a source for actors: references to the object store."""

    known: Table
    splits: dict[str, Any]  # references to the Rows of each split

    @classmethod
    def of(cls, source: Source, splits: Iterable[str]) -> "Lent":
        """Put the rows of some splits into the object store."""
        import ray

        table = source.table()
        return cls(table, {split: ray.put(source.read(table.of(split)[0])) for split in splits})

    def table(self) -> Table:
        return self.known

    def read(self, part: Part) -> Rows:
        import ray

        return ray.get(self.splits[part.split])


class ShardRows:
    """An actor that reads shards of a source, or cuts them out of what is in memory.

    It takes no CPU for itself. Tasks would, in effect: where teachers have all CPUs of a node, Ray
    ends idle processes, and starts a new one for the next task.
    """

    def __init__(self, source: Source):
        self.source = source
        self.table = source.table()
        counts = self.table.rows_of_parts
        self.edges = {split: np.cumsum([0, *each]) for split, each in counts.items()}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The shards of one part in, their block out."""
        shards = shards_in(batch)
        try:
            edges = self.edges[shards[0].split]
            place = int(np.searchsorted(edges, shards[0].first, side="right")) - 1
            start = int(edges[place])
            rows = self.source.read(self.table.of(shards[0].split)[place])
        except RaykdError as fault:
            raise at_node(fault) from None
        blocks = [
            block_of(rows.take(slice(shard.first - start, shard.last - start)), shard)
            for shard in shards
        ]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


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
            check_teacher(recipe, wanted["teacher"])
            self.writers = layer_signals.writers(folder, wanted, signals_of(recipe))
        except RaykdError as fault:  # an actor whose start fails is started again
            self.fault = at_node(fault)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The block of some shards in.

        Out come, for each, how many rows were scored, how many cannot be, and the CPU seconds
        spent.
        """
        if self.fault:
            raise self.fault
        names = [field.name for field in fields(Rows)]
        rows = Rows(**{name: batch[name] for name in names if name in batch})
        try:
            shards = shards_in(batch)
            edges = np.cumsum([0, *(shard.last - shard.first for shard in shards)]).tolist()
            assert edges[-1] == len(rows), "a block holds whole shards"
            found = [
                self._score(shard, rows.take(slice(start, end)))
                for shard, (start, end) in zip(shards, pairwise(edges), strict=True)
            ]
        except RaykdError as fault:
            raise at_node(fault) from None
        return {name: [one[name] for one in found] for name in found[0]}

    def _score(self, shard: Shard, rows: Rows) -> dict[str, Any]:
        started = time.process_time()
        table, unfit = self.scorer.score(rows)
        for name, columns_of_layer in layer_signals.split(table).items():
            if not self.writers[name].is_sound(shard):
                sums = None if name else self.scorer.sums(columns_of_layer, rows, shard.split)
                self.writers[name].commit(shard, columns_of_layer, unfit, sums)
        seconds = time.process_time() - started
        return {"rows": table.num_rows, "bad": len(unfit), "seconds": seconds}


def read_together(table: Table, shards: Sequence[Shard]) -> list[list[Shard]]:
    """The shards that are read as one: those of a part, or each where rows are in memory."""
    if not table.in_parts:
        return [[shard] for shard in shards]
    edges = {split: np.cumsum(counts) for split, counts in table.rows_of_parts.items()}

    def part_of(shard: Shard) -> tuple[str, int]:
        return shard.split, int(np.searchsorted(edges[shard.split], shard.first, side="right"))

    return [list(some) for _, some in groupby(shards, part_of)]


def shards_in(batch: Mapping[str, Any]) -> list[Shard]:
    """The shards that the lines of a batch are of, in their order."""
    _, places = np.unique(batch["number"], return_index=True)
    return [
        Shard(
            int(batch["number"][place]),
            str(batch["split"][place]),
            int(batch["first"][place]),
            int(batch["last"][place]),
        )
        for place in places
    ]


def stores_address(recipe: Recipe, out: Path) -> Address:
    """The address under which a recipe's teacher stores lie side by side."""
    return recipe.scale.store or out / "stores"


def locate(recipe: Recipe, rows: Facts, out: Path) -> tuple[Address, dict[str, Any]]:
    """(address, identity) of the store that belongs to a recipe, whether or not it exists."""
    identity = store_identity(recipe, rows)
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
    return all(holds(each.place, each.manifest["shards"]) for each in stores)


def score(recipe: Recipe, source: Source, out: Path) -> Address:
    """Score every row that is not yet in the store, finish the store, and give its address.

    Needs a Ray session. DataError names the rows that cannot be scored if they are more than
    `scale.max_bad_rows`; the next call tries them again.
    """
    table = source.table()
    say("score", table.describe())
    address, identity = locate(recipe, table, out)
    shards = plan_shards(table.rows_of_parts, recipe.store.rows_per_shard)
    writers = layer_signals.writers(address, identity, signals_of(recipe))
    writer = writers[""]
    if len(writer.quarantined(shards)) > recipe.scale.max_bad_rows:
        for shard in shards:
            if writer.quarantined([shard]):
                writer.retract(shard)
    _score_missing(recipe, source, writers, shards)
    records = writer.records(shards)
    writer.finish(shards, _statistics(recipe, source, writer, records), records)
    for name in signals_of(recipe):
        writers[name].finish(shards, {})
    return address


def _statistics(
    recipe: Recipe, source: Source, writer: StoreWriter, records: ShardRecords
) -> dict[str, Any]:
    """What the manifest says of the whole data set: from the sums beside the shards where rows are
    read in parts, else from the values of all rows.

    Those of a manifest that stands, of these very shards, are left as they are.
    """
    try:
        standing = read_manifest(writer.place)
    except StoreError:
        standing = {}
    if standing.get("shards") == records:
        return standing["statistics"]
    table = source.table()
    if not table.in_parts:
        # the statistics read the shards, so a provisional view serves until the manifest exists
        return store_statistics(recipe, source, Store.of_shards(writer.place, records))
    found = {}
    for split in ("train", "val"):
        of_split = [record for record in records if record["split"] == split]
        found[split] = total(shard_sums(recipe, source, writer, of_split))
    return summed_statistics(table, found)


def shard_sums(
    recipe: Recipe, source: Source, writer: StoreWriter, records: Sequence[dict[str, Any]]
) -> Iterator[Sums]:
    """What each shard adds to the statistics.

    A shard that was scored before there were sums beside it is read with its rows, and gets them.
    """
    read = 0
    table = source.table()
    for record, told in zip(records, in_turn(writer.sums, records, LISTERS), strict=True):
        sums = Sums.read(told)
        if sums is None:
            if not read:
                say("score", f"shards of {record['split']} without sums beside them are read")
            read += 1
            split = record["split"]
            edges = np.cumsum([0, *table.rows_of_parts[split]])
            place = int(np.searchsorted(edges, record["first"], side="right")) - 1
            start = int(edges[place])
            rows = source.read(table.of(split)[place])
            rows = rows.take(slice(record["first"] - start, record["last"] - start))
            stored = read_shard(writer.place, record)
            sums = sums_of(stored, rows, split, recipe.valence.discount)
            writer.put_sums(record, sums.told())
        yield sums


def _missing(writers: Iterable[StoreWriter], shards: list[Shard]) -> list[Shard]:
    """The shards that a store or one of its signals lacks, in their order."""
    found: set[Shard] = set()
    for writer in writers:
        found.update(writer.missing(shards))
    return sorted(found, key=lambda shard: shard.number)


def _score_missing(
    recipe: Recipe,
    source: Source,
    writers: Mapping[str, StoreWriter],
    shards: list[Shard],
) -> None:
    """Score what a store and its signals lack of all shards.

    Where actors are lost more often than Ray allows, the shards that are missing then are begun
    again, as long as shards get done, or within `scale.start_timeout_s` without.
    """
    import ray.exceptions

    writer = writers[""]
    missing = _missing(writers.values(), shards)
    if not missing:
        return
    progress = Progress("score", sum(shard.last - shard.first for shard in missing), "rows")
    done = 0
    bad = len(writer.quarantined(shards))
    seconds = 0.0
    patience = Patience(recipe.scale.start_timeout_s)
    while missing:
        try:
            with warnings.catch_warnings():
                # Ray Data warns of its own defaults, and of the only way to bound retries
                warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray.")
                warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
                for row in shard_results(recipe, source, writer, missing).iter_rows():
                    done += int(row["rows"])
                    seconds += float(row["seconds"])
                    progress.advance(done)
                    bad += int(row["bad"])
                    if bad > recipe.scale.max_bad_rows:
                        quarantined = writer.quarantined(shards)
                        raise DataError(bad_rows(quarantined, recipe.scale.max_bad_rows))
            break
        except (RaykdError, ray.exceptions.RayError, RuntimeError) as error:
            fault = plain_error(error, "score")
            if not patience.again(error, done):
                raise fault from None
            say("score", f"! {fault}; goes on with the shards that are missing")
            missing = _missing(writers.values(), shards)
            bad = len(writer.quarantined(shards))
    before = seconds_of(writer.place) or 0.0
    writer.place.put("_TIMING.json", to_json({"seconds": before + seconds}))
    progress.finish()


def quiet_context() -> None:
    """Let Ray Data print nothing of its own, and cut no block."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None
    context.target_max_block_size = None  # a block is what a reader gives at a time
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def shard_results(
    recipe: Recipe,
    source: Source,
    writer: StoreWriter,
    shards: list[Shard],
    actor: type[ShardActor] = ShardActor,
) -> Any:
    """The Ray Data set of what `actor` gives of each shard; reading it scores the shards."""
    import ray.data

    quiet_context()
    table = source.table()
    header = Header.of(recipe, table)
    recipe = placed(recipe)
    if not table.in_parts:
        source = Lent.of(source, {shard.split for shard in shards})
    together = [[asdict(shard) for shard in some] for some in read_together(table, shards)]
    low, high = (min(size, len(together)) for size in recipe.scale.scorers)
    descriptors = ray.data.from_arrow([pa.Table.from_pylist(some) for some in together])
    blocks = descriptors.map_batches(
        ShardRows,
        fn_constructor_args=(source,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=-(-high // FED)),
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
