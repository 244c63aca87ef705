"""Rows become parts once: in this process where they are few, else by a job of Ray Data."""

import os
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa

from raykd.console import Progress, say
from raykd.data.prepared.units import Unit
from raykd.data.prepared.work import Work
from raykd.errors import RaykdError
from raykd.files import waiting
from raykd.files.address import Address
from raykd.files.cache import cache_folder
from raykd.files.open import address_below
from raykd.orchestration.cluster import check_seen
from raykd.orchestration.patience import Patience
from raykd.orchestration.scoring import quiet_context
from raykd.orchestration.session import at_node, plain_error
from raykd.recipe.recipe import Recipe

RESTARTS = 3  # of an actor
LOST_S = 120  # that actors may be lost again and again without a unit done
SMALL_BYTES = 256 << 20  # of a source that this process prepares by itself


class UnitActor:
    """One actor of the pool, which prepares and commits units."""

    def __init__(self, work: Work):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the actors share the cores
        self.work = work
        self.fault: RaykdError | None = None
        home = work.folder.address
        try:
            if isinstance(home, Path):
                check_seen(home)
        except RaykdError as fault:  # an actor whose start fails is started again
            self.fault = at_node(fault)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The number of a unit in; out come its rows and bytes."""
        if self.fault:
            raise self.fault
        units = [self.work.units[int(number)] for number in batch["number"]]
        try:
            rows = [self.work.do(unit) for unit in units]
        except RaykdError as fault:
            raise at_node(fault) from None
        return {"rows": rows, "bytes": [unit.bytes for unit in units]}


def is_small(work: Work) -> bool:
    """Whether this process prepares the rows by itself. A function is asked here, in its order."""
    return sum(unit.bytes for unit in work.units) <= SMALL_BYTES


def rows_address(recipe: Recipe, out: Path) -> Address:
    """The address under which prepared rows lie side by side, beside the teacher stores."""
    return address_below(recipe.scale.store or out, "rows")


def prepare_rows(work: Work) -> None:
    """Prepare all rows that are not prepared yet, and write the manifest.

    Needs a Ray session where they are not few. The next command continues what was ended.
    """
    folder = work.folder
    folder.begin()
    say("prepare", f"{work.name}: rows as parts, in {folder.address}")
    # of several commands on this node one does the work, and the others find it done
    with waiting.locked(cache_folder() / "prepare" / folder.place.name, wait=True):
        if folder.manifest() is None:
            _prepare(work)


def _prepare(work: Work) -> None:
    if work.files is None:
        progress = Progress("prepare", None, "rows")
        work.do_function(progress.advance)
    else:
        missing = work.missing()
        progress = Progress("prepare", _rows_of(work, missing), "rows")
        shown = _Shown(progress, sum(unit.bytes for unit in missing))
        if is_small(work):
            for unit in missing:
                shown.done(work.do(unit), unit.bytes)
        else:
            _by_ray(work, missing, shown)
    manifest = work.finish()
    progress.finish(f"{len(manifest['parts'])} parts")


class _Shown:
    """The progress in rows, whose total is foretold by the bytes that are done."""

    def __init__(self, progress: Progress, total: int):
        self.progress = progress
        self.total = total
        self.rows = 0
        self.bytes = 0

    def done(self, rows: int, size: int) -> None:
        self.rows += rows
        self.bytes += size
        self.progress.total = round(self.rows * self.total / max(self.bytes, 1))
        self.progress.advance(self.rows)


def _rows_of(work: Work, missing: list[Unit]) -> int | None:
    """How many rows these units have; None where they must be read to know it."""
    counts = [unit.rows for unit in missing]
    return sum(counts) if all(counts) else None


def _by_ray(work: Work, missing: list[Unit], shown: _Shown) -> None:
    """Prepare units by actors; where those are lost too often, as scoring does."""
    import ray.exceptions

    patience = Patience(LOST_S)
    while missing:
        try:
            with warnings.catch_warnings():
                # Ray Data warns of its own defaults, and of the only way to bound retries
                warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray.")
                warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
                for row in _unit_results(work, missing).iter_rows():
                    shown.done(int(row["rows"]), int(row["bytes"]))
            return
        except (RaykdError, ray.exceptions.RayError, RuntimeError) as error:
            fault = plain_error(error, "prepare")
            if not patience.again(error, shown.bytes):
                raise fault from None
            say("prepare", f"! {fault}; goes on with the units that are missing")
            missing = work.missing()


def _unit_results(work: Work, units: list[Unit]) -> Any:
    """The Ray Data set of the rows and bytes of each unit; reading it prepares them."""
    import ray
    import ray.data

    table = pa.table({"number": [unit.number for unit in units]})
    most = max(1, min(len(units), int(ray.cluster_resources().get("CPU", 1))))
    quiet_context()
    each = [table.slice(place, 1) for place in range(len(units))]
    return ray.data.from_arrow(each).map_batches(
        UnitActor,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=1,
        max_restarts=RESTARTS,
        max_task_retries=-1,
    )
