"""Whether an artefact's run.py decides as the report says, on every test row.

    python -m pipelines.bench.artefact [--smoke]

Students of series (rows of equal and of unequal length), of images as series and of text are
trained for a moment and exported in full precision, int8, int4 and ternary. Then each folder is
copied away and its run.py is started as a user starts it: another working directory, nothing of
raykd in the way, rows in every form of file that the model card names. The last line is a JSON
object of the shares of decisions that are the report's; each must be 1.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from raykd import data
from raykd.data import Dataset, Rows
from raykd.data.table import Held
from raykd.deploy import run_artefact
from raykd.recipe.recipe import Recipe
from raykd.stages.check import check_with_data
from raykd.stages.load import resolve
from raykd.training import predictions, run_files
from raykd.training.arm import World
from raykd.training.run_arms import run_arms

TOKENIZER = Path(__file__).parents[2] / "examples" / "code_lm" / "tokenizer.json"
WIDTHS: dict[str, dict[str, str] | None] = {
    "fp32": None,
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "per": "group"},
    "ternary": {"weights": "ternary"},
}
SMOKE = [("series_ragged", "fp32"), ("series_ragged", "int8"), ("text", "int8")]
CLASSES = 3
LIMIT_S = 600.0

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="three folders, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = SMOKE if options.smoke else [(kind, width) for kind in KINDS for width in WIDTHS]
    with tempfile.TemporaryDirectory() as place:
        found = dict(figures(pairs, Path(place)))
    print(json.dumps(found))
    if min(found.values()) < 1:
        sys.exit("run.py decides otherwise than the report says")


def figures(pairs: list[tuple[str, str]], place: Path) -> Iterator[tuple[str, float]]:
    """(key, share of equal decisions) of each kind of rows and width."""
    for kind, width in pairs:
        source = place / kind
        if not source.exists():
            source.mkdir()
            table = pa.Table.from_pylist(list(KINDS[kind]()))
            pq.write_table(table, source / "rows.parquet")
        share, count = agreement(kind, width, source, place / f"{kind}-{width}")
        print(f"{kind}, {width}: {share:.2%} of {count} decisions", flush=True)
        yield f"agreement.{kind}.{width}", share


def agreement(kind: str, width: str, source: Path, folder: Path) -> tuple[float, int]:
    """The share of decisions of run.py that are the report's, and how many there are."""
    recipe = recipe_of(kind, width, source)
    dataset = data.load(recipe.data)
    check_with_data(recipe, Held(dataset), folder)
    quietly = {"report": lambda *_: None, "device": torch.device("cpu"), "world": World()}
    run_arms(recipe, None, folder, **quietly)
    run_artefact.write(recipe, Held(dataset), folder)
    reported = predictions.read(folder / run_files.ARTEFACT_ANSWERS).answer
    away = folder.with_name(f"{folder.name} away")
    shutil.copytree(run_files.artefact(folder), away)
    equal = []
    for decided in (of_text if dataset.is_text else of_series)(away, dataset):
        assert decided.shape == reported.shape, f"{decided.shape} answers for {reported.shape}"
        equal.append(decided == reported)
    return float(np.concatenate(equal).mean()), sum(map(len, equal))


def recipe_of(kind: str, width: str, source: Path) -> Recipe:
    """A recipe that trains a small student for a moment."""
    quant = WIDTHS[width]
    raw: dict[str, Any] = {
        "name": f"{kind}-{width}",
        "technique": "none",
        "control": False,
        "unrounded": False,
        "seeds": [0],
        "data": {"source": str(source)},
        "optim": {"steps": 12, "batch": 16, "evaluate_every": 12, "learning_rate": 0.01},
        "student": {"settings": {"width": 32, "layers": 1}},
        "phases": [{"until": 1.0, "quant": quant}] if quant else [],
    }
    if kind == "text":
        raw["data"] |= {"tokenizer": str(TOKENIZER), "window": 64}
        sizes = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "inner": 64}
        raw["student"] = {"model": "llama", "settings": sizes}
    return resolve(raw)


def of_series(folder: Path, dataset: Dataset) -> Iterator[NDArray[np.int64]]:
    """(N,) run.py's decisions on the test rows, for each form in which a user may have them."""
    rows = dataset.splits["test"]
    lengths = rows.mask.sum(1)
    each = [row[:length] for row, length in zip(rows.inputs, lengths, strict=True)]
    given = folder.with_name(f"{folder.name} rows.npz")
    np.savez(given, *each)
    yield classes_of(asked(folder, given), dataset)
    np.savez(given, inputs=rows.inputs, lengths=lengths)
    yield classes_of(asked(folder, given), dataset)
    np.savez(given, inputs=rows.inputs, mask=rows.mask)
    yield classes_of(asked(folder, given), dataset)
    if rows.mask.all():
        np.save(given.with_suffix(".npy"), rows.inputs)
        yield classes_of(asked(folder, given.with_suffix(".npy")), dataset)


def classes_of(printed: str, dataset: Dataset) -> NDArray[np.int64]:
    """The classes that run.py names, line by line."""
    names = [line.partition("\t")[0] for line in printed.splitlines()]
    return np.array([dataset.classes.index(name) for name in names])


def of_text(folder: Path, dataset: Dataset) -> Iterator[NDArray[np.int64]]:
    """(n,) run.py's decisions at all places of the test rows; and, of some rows, those of the
    token that it writes after each beginning of a text.
    """
    rows = dataset.splits["test"]
    given = folder.with_name(f"{folder.name} texts.npz")
    np.savez(given, *texts_of(rows))
    lines = asked(folder, "--next", given).splitlines()
    decided = [np.array(line.split(), np.int64) for line in lines]
    places = [each[mask[: len(each)]] for each, mask in zip(decided, rows.mask, strict=True)]
    yield np.concatenate(places)


def texts_of(rows: Rows) -> list[NDArray[np.int64]]:
    """The tokens of each row, up to its last place."""
    ends = [int(np.flatnonzero(mask)[-1]) + 1 for mask in rows.mask]
    return [row[:end, 0].astype(np.int64) for row, end in zip(rows.inputs, ends, strict=True)]


def asked(folder: Path, *words: Path | str) -> str:
    """What run.py prints, started from another folder without anything of this process."""
    command = [sys.executable, "-I", str(folder / "run.py"), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def series(shortest: int, longest: int) -> Iterator[Record]:
    """Rows of three classes, each a slope in noise, of some length up to the longest."""
    draws = np.random.default_rng(0)
    for number in range(240):
        label = number % CLASSES
        steps = int(draws.integers(shortest, longest + 1))
        slope = np.linspace(0, label - 1, steps)[:, None] * np.array([1, -1, 0.5, 2])
        row = slope + draws.normal(scale=0.7, size=(steps, 4))
        yield record(number, {"inputs": row.tolist(), "label": f"class {label}"})


def images() -> Iterator[Record]:
    """Images of 12 x 12 points with a bright bar, a row of points a step."""
    draws = np.random.default_rng(1)
    for number in range(240):
        label = number % CLASSES
        image = draws.normal(scale=0.5, size=(12, 12))
        image[:, 4 * label : 4 * label + 4] += 1
        yield record(number, {"inputs": image.tolist(), "label": f"bar {label}"})


def texts() -> Iterator[Record]:
    """Small functions of Python, of unequal length."""
    for number in range(120):
        lines = [f"def f{number}(x):"] + [
            f"    x = x * {number} + {i}" for i in range(4 + number % 9)
        ]
        yield record(number, {"text": "\n".join([*lines, "    return x\n"])})


def record(number: int, values: Record) -> Record:
    """A row of the data set in its split."""
    part = number // CLASSES % 4
    return values | {"split": ("train", "val", "test", "test")[part]}


KINDS: dict[str, Callable[[], Iterator[Record]]] = {
    "series_equal": lambda: series(24, 24),
    "series_ragged": lambda: series(5, 29),
    "images": images,
    "text": texts,
}


if __name__ == "__main__":
    main()
