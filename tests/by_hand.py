"""A small teacher with random weights, and its store scored by hand: what Ray schedules, without
Ray.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from raykd import data
from raykd.cli import cli
from raykd.data import Dataset, Rows
from raykd.data.table import Held
from raykd.errors import RaykdError
from raykd.files.address import Address
from raykd.files.open import address_below
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.recipe import Recipe
from raykd.store import layer_signals
from raykd.store.commit import Shard, plan_shards, store_id
from raykd.store.reader import Store
from raykd.teacher.identity import signals_of, store_identity
from raykd.teacher.scorer import Header, Scorer
from raykd.teacher.statistics import store_statistics

S = TypeVar("S", bound=Scorer)
SETTINGS = {"steps": 16, "width": 8, "layers": 3, "heads": 2}


def teacher(path: Path, seed: int = 0) -> dict[str, Any]:
    """The `[teacher]` table of an encoder for the gestures, its weights drawn by `seed` and saved
    at `path`.
    """
    torch.manual_seed(seed)
    save_file(SeriesEncoder(channels=6, classes=7, **SETTINGS).state_dict(), path)
    return {"weights": str(path), "settings": SETTINGS}


def scorer_of(recipe: Recipe, kind: type[S] = Scorer) -> tuple[S, Dataset]:
    """(a recipe's teacher, ready to score, the recipe's rows)."""
    dataset = data.load(recipe.data, recipe.task)
    return kind(recipe, Header.of(recipe, dataset)), dataset


def rows_of(dataset: Dataset, shard: Shard) -> Rows:
    """The rows of a shard."""
    return dataset.splits[shard.split].take(slice(shard.first, shard.last))


def score(found: Recipe, out: Address, *, backwards: bool = False) -> Any:
    """The address of a recipe's store, scored shard by shard on one thread, as each actor of the
    pool does.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    scorer, dataset = scorer_of(found)
    wanted = store_identity(found, dataset)
    folder = address_below(out, store_id(wanted))
    shards = plan_shards({n: len(r) for n, r in dataset.splits.items()}, found.store.rows_per_shard)
    writers = layer_signals.writers(folder, wanted, signals_of(found))
    for shard in shards[::-1] if backwards else shards:
        for name, part in layer_signals.split(scorer.table(rows_of(dataset, shard))).items():
            writers[name].commit(shard, part)
    for name, writer in writers.items():
        view = Store.of_shards(folder, writer.records(shards))
        writer.finish(shards, {} if name else store_statistics(found, Held(dataset), view))
    torch.set_num_threads(before)
    return folder


def score_backwards(found: Recipe, out: Path) -> None:
    """The same, last shard first."""
    score(found, out, backwards=True)


def typed(*argv: object) -> tuple[int, str]:
    """(exit code, what is said) of `raykd store ...`; a user's error is what `main` would print."""
    done = CliRunner().invoke(cli, ["store", *map(str, argv)])
    error = done.exception
    return getattr(error, "exit_code", done.exit_code), str(error) if isinstance(
        error, RaykdError
    ) else done.output
