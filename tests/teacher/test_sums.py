"""Laws of what shards add to a store's statistics: any shards come to the statistics of all values,
exactly or within the bins that are stated.
"""

import json
from dataclasses import replace
from pathlib import Path

import by_hand
import numpy as np
import pytest
import stored
from numpy.typing import NDArray
from parts import Cut

from raykd import data
from raykd.data import Dataset
from raykd.data.table import Held, Table
from raykd.orchestration import scoring
from raykd.recipe.recipe import Recipe
from raykd.store.commit import Shard, StoreWriter, plan_shards
from raykd.store.reader import Store
from raykd.teacher.scorer import Header, Scorer
from raykd.teacher.statistics import QUANTILES, store_statistics, summed_statistics
from raykd.teacher.sums import BITS, Moments, Sums, total

CLOSE = 2.0 ** -(BITS + 1)  # of a value: what the middle of its bin is off by
FACTS = Table("rows", "series", ("a", "b"), {}, "0", (), class_counts=(3, 4))


class InParts(Cut):
    """Rows of memory as if each part lay in a file."""

    def table(self) -> Table:
        found = super().table()
        return replace(found, parts=tuple(part._replace(file="rows") for part in found.parts))


def of_values(values: NDArray[np.float32]) -> Sums:
    """The sums of some saliencies."""
    import pyarrow as pa

    from raykd.teacher.sums import sums_of

    return sums_of(pa.table({"saliency": values}), NO_ROWS, "train", 0.9)


NO_ROWS = None  # type: ignore[assignment]
DRAWS = {
    "normal": lambda draw: draw.normal(size=3000),
    "of both signs, small and large": lambda draw: draw.normal(size=3000) ** 5,
    "one value": lambda draw: np.full(3000, -0.25),
    "zeros of both signs": lambda draw: np.where(draw.random(3000) < 0.5, 0.0, -0.0),
    "some unknown": lambda draw: np.where(draw.random(3000) < 0.3, np.nan, draw.random(3000)),
    "all unknown": lambda draw: np.full(3000, np.nan),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("shard", [1, 7, 1024, 3000])
def test_sums_of_shards_are_the_statistics_of_all_values(kind, shard):
    values = DRAWS[kind](np.random.default_rng(0)).astype(np.float32)[: 64 if shard == 1 else None]
    shards = [of_values(values[i : i + shard]) for i in range(0, len(values), shard)]
    shards.insert(1, of_values(values[:0]))
    again = [Sums.read(json.loads(json.dumps(sums.told()))) for sums in shards]
    assert again == shards
    told = summed_statistics(FACTS, {"train": total(shards), "val": Sums()})["saliency"]
    known = values[np.isfinite(values)].astype(np.float64)
    assert told["missing"] == len(values) - len(known)
    if not len(known):
        assert told["mean"] is told["std"] is told["quantiles"] is told["histogram"] is None
        return
    assert told["mean"] == pytest.approx(known.mean(), rel=1e-9, abs=1e-12)
    assert told["std"] == pytest.approx(known.std(ddof=1), rel=1e-9, abs=1e-12)
    ordered = np.sort(known)
    for share, found in zip(QUANTILES, told["quantiles"], strict=True):
        wanted = ordered[int(share * (len(known) - 1))]
        assert found == pytest.approx(wanted, rel=CLOSE, abs=1e-30)
    assert told["quantiles"][0] == known.min()
    assert told["quantiles"][-1] == known.max()
    counts, edges = np.histogram(known, 24)
    assert told["histogram"]["edges"] == pytest.approx(edges.tolist())
    assert sum(told["histogram"]["counts"]) == len(known)
    near = CLOSE * np.abs(edges)
    within = near[:, None] >= np.abs(known[:, None] - edges).T  # values that may be counted beside
    off = np.cumsum(told["histogram"]["counts"]) - np.cumsum(counts)
    assert (np.abs(off) <= within[1:].sum(1)).all()


def test_moments_of_pieces_are_those_of_all_pairs():
    draw = np.random.default_rng(0)
    x = 1000 + draw.normal(size=500)
    y = 0.3 * x + draw.normal(size=500)
    for cuts in ([], [1], [0, 0, 200], [100, 200, 499]):
        pieces = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
        found = sum((Moments.of(a, b) for a, b in pieces), Moments())
        assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
        assert found.std == pytest.approx(x.std(ddof=1), rel=1e-9)
    assert Moments.of(x[:1], y[:1]).std is None
    assert Moments.of(x, np.ones(500)).correlation is None
    assert Moments().correlation is None


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {},
        {"bins": 3},
        Sums().told() | {"bins": [[1, 1]]},
        Sums().told() | {"missing": "x"},
    ],
)
def test_what_are_no_sums_is_not_read(told):
    assert Sums.read(told) is None


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[Recipe, Dataset]:
    made = stored.write(tmp_path_factory.mktemp("rows"))
    raw = {
        "data": {"source": str(made / "rows")},
        "teacher": {"weights": str(made / "teacher.safetensors"), "settings": by_hand.SETTINGS},
        "terms": {"kd": {}},
        "store": {"codec": "dense", "rows_per_shard": 16},
    }
    from raykd.stages.load import resolve

    recipe = resolve(raw)
    return recipe, data.load(recipe.data)


def scored(recipe: Recipe, source: InParts, out: Path) -> tuple[StoreWriter, list[Shard]]:
    """A store that is scored and not finished."""
    table = source.table()
    scorer = Scorer(recipe, Header.of(recipe, table))
    writer = StoreWriter(out, {"rows": "these"})
    shards = plan_shards(table.rows_of_parts, 16)
    for shard in shards:
        piece = source.dataset.splits[shard.split].take(slice(shard.first, shard.last))
        answers = scorer.table(piece)
        writer.commit(shard, answers, None, scorer.sums(answers, piece, shard.split))
    return writer, shards


def test_a_driver_finishes_a_store_without_a_shard(rows, tmp_path, monkeypatch, capsys):
    recipe, dataset = rows
    source = InParts(dataset, 40)
    writer, shards = scored(recipe, source, tmp_path)
    wanted = store_statistics(
        recipe, Held(dataset), Store.of_shards(tmp_path, writer.records(shards))
    )
    get = writer.place.get
    asked: list[str] = []
    spied = lambda _, name, **key: asked.append(name) or get(name, **key)  # noqa: E731
    monkeypatch.setattr(type(writer.place), "get", spied)
    found = scoring._statistics(recipe, source, writer, writer.records(shards))
    assert asked
    assert not [name for name in asked if name.startswith("data/")]
    assert source.read_parts == []
    assert found["rows"] == wanted["rows"]
    assert found["class_prior"] == wanted["class_prior"]
    for key in ("mean", "std"):
        assert found["saliency"][key] == pytest.approx(wanted["saliency"][key], rel=1e-5)
    wanted_quantiles = wanted["saliency"]["quantiles"]  # between values, of which there are few
    assert found["saliency"]["quantiles"] == pytest.approx(wanted_quantiles, abs=0.01)
    correlations = [each["value_head"]["val_correlation"] for each in (found, wanted)]
    assert correlations[0] == pytest.approx(correlations[1], rel=1e-9)
    assert "without sums" not in capsys.readouterr().err
    for name in ("_sums/00001.json", "_sums/00014.json"):
        writer.place.delete(name)
    writer.place.put("_sums/00002.json", b"{")
    writer.put_sums(writer.records(shards)[3] | {"sha256": "0"}, Sums().told())
    assert scoring._statistics(recipe, source, writer, writer.records(shards)) == found
    assert capsys.readouterr().err.count("without sums") == 2  # once a split
    assert scoring._statistics(recipe, source, writer, writer.records(shards)) == found
    assert "without sums" not in capsys.readouterr().err


def test_the_statistics_of_a_manifest_stand(rows, tmp_path):
    recipe, dataset = rows
    source = InParts(dataset, 40)
    writer, shards = scored(recipe, source, tmp_path)
    writer.finish(shards, {"told": "before there were sums"})
    assert scoring._statistics(recipe, source, writer, writer.records(shards)) == {
        "told": "before there were sums"
    }


def test_rows_in_memory_leave_no_sums(rows, tmp_path):
    recipe, dataset = rows
    writer, _ = scored(recipe, Cut(dataset, 40), tmp_path)
    assert not writer.place.listed("_sums")
