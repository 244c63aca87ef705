"""Users' own rows: files of a folder or a bucket, or a Python function that returns rows."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data import held, labels, text
from raykd.data.blocks import MISSING, Block, Ragged, encoded
from raykd.data.column_names import NEXT, check_no_labels, column_names
from raykd.data.file_rows import Batch, FileRows, block_of
from raykd.data.formats import ParquetTable, TableFile
from raykd.data.layout import PARQUET
from raykd.data.room import check_memory, check_taken
from raykd.data.rows import Dataset, Unfit
from raykd.data.sentences import Texts
from raykd.errors import DataError
from raykd.files.data_files import open_files
from raykd.recipe import imports
from raykd.recipe.tables import DataRef, Task
from raykd.recipe.user_code import user_code

A_LOOK = 100  # rows, after which the memory is looked at
MOST_ROWS = 1 << 22  # that are held in memory, unless a recipe asks for it
MOST_BYTES = 2 << 30  # of their inputs


def load_files(ref: DataRef, task: Task = NEXT) -> Dataset:
    """The data set of the files of a folder or a bucket, in the order of their paths.

    `data.columns` names the columns. A folder `split=train` gives the files below it that column.
    """
    rows = FileRows(open_files(ref.source), ref, task)
    name = rows.files.name
    opened = rows.open_all()
    batches = _batches(rows, opened)
    if ref.tokenizer and task.of_texts:
        texts = Texts(ref, name)
        blocks = [block_of(batch, name, texts) for batch in batches]
        loaded = texts.told(held.dataset(blocks, name, ref))
    elif ref.tokenizer:
        loaded = text.load(_records(batches), name, ref)
    else:
        check_memory(_input_values(rows, opened), name)
        loaded = held.dataset([block_of(batch, name) for batch in batches], name, ref)
    starts = list(accumulate((sum(table.groups) for table in opened), initial=0))
    unfit = []
    for one in loaded.unfit:
        number = bisect_right(starts, one.row) - 1
        file = rows.laid[number].file.name
        unfit.append(one._replace(place=f"{file}, row {one.row - starts[number]}"))
    return replace(loaded, unfit=tuple(unfit))


def is_large(rows: FileRows) -> bool:
    """Whether files hold more rows than are held in memory unless a recipe asks for it.

    A text takes about twice its bytes as inputs.
    """
    size = sum(laid.file.bytes for laid in rows.laid)
    if rows.ref.tokenizer:
        return size > MOST_BYTES // 2
    if any(laid.kind != PARQUET for laid in rows.laid):
        return size > MOST_BYTES
    opened = rows.open_all()
    count = sum(sum(table.groups) for table in opened)
    return count > MOST_ROWS or 4 * _input_values(rows, opened) > MOST_BYTES


def _input_values(rows: FileRows, opened: Sequence[TableFile]) -> int:
    """How many values the inputs of all Parquet files hold, by their footers."""
    return sum(
        table.values_of(group, rows.names["inputs"])
        for table in opened
        if isinstance(table, ParquetTable)
        for group in range(len(table.groups))
    )


def _batches(rows: FileRows, opened: Sequence[TableFile]) -> Iterator[Batch]:
    """All rows of the files, numbered over all of them."""
    types = rows.agreed(opened)
    count = 0
    for laid, table in zip(rows.laid, opened, strict=True):
        for group in range(len(table.groups)):
            for batch in rows.batches(laid, table, group, types):
                yield batch._replace(first=count + batch.first)
        count += sum(table.groups)


def _records(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Rows as dicts by key."""
    for batch in batches:
        columns = [column.to_pylist() for column in batch.columns.values()]
        for values in zip(*columns, strict=True):
            yield dict(zip(batch.columns, values, strict=True))


class TooManyRows(Exception):
    """A function gives more rows than are held in memory."""


def load_function(ref: DataRef, most: int | None = None, task: Task = NEXT) -> Dataset:
    """The data set that `module:function(**data.settings)` gives.

    The function returns a Dataset, or dicts with the keys that `data.columns` names. TooManyRows
    where it gives more than `most`.
    """
    given = _given(ref)
    if isinstance(given, Dataset):
        return _checked_classes(given, ref)
    rows: list[dict[str, Any]] = []
    for some in _in_batches(given, ref, task):
        rows += some
        if most is not None and len(rows) > most:
            raise TooManyRows
    name = ref.source.partition(":")[2]
    if ref.tokenizer and task.of_texts:
        texts = Texts(ref, name)
        block = block_of_records(rows, column_names(ref, task), name, ref, texts=texts)
        return texts.told(held.dataset([block], name, ref))
    if ref.tokenizer:
        return text.load(rows, name, ref)
    return held.dataset([block_of_records(rows, column_names(ref), name, ref)], name, ref)


def function_rows(ref: DataRef) -> Iterator[list[dict[str, Any]]]:
    """What `module:function(**data.settings)` yields, some rows at a time.

    DataError where it returns a Dataset, which is in memory already.
    """
    given = _given(ref)
    if isinstance(given, Dataset):
        raise DataError(
            f'optim.order = "blocks": {ref.source} returns a Dataset, which is in memory; leave '
            "it out, or let the function yield rows"
        )
    yield from _in_batches(given, ref)


def _given(ref: DataRef) -> Any:
    """A Dataset, or what can be iterated over."""
    function = imports.load(ref.source, "data.source")
    with user_code(_Where(ref.source), DataError):
        given = function(**ref.settings)
    if not isinstance(given, Dataset | Iterable):
        raise DataError(
            f"data.source {ref.source}: gives {str(given)[:40]!r} of type "
            f"{type(given).__name__}; return a list of dicts, or yield dicts"
        )
    return given


def _in_batches(
    given: Iterable[Any], ref: DataRef, task: Task = NEXT
) -> Iterator[list[dict[str, Any]]]:
    """The checked rows of a function, some at a time; only then is its code run."""
    names = column_names(ref, task)
    where = _Where(ref.source)
    with user_code(where, DataError):
        rows = iter(given)
    while True:
        some: list[dict[str, Any]] = []
        with user_code(where, DataError):
            for row in islice(rows, A_LOOK):
                _check_count(where.rows, ref)
                some.append(_checked_row(row, where.rows, names, ref, task))
                where.rows += 1
        if not some:
            return
        yield some


def _check_count(count: int, ref: DataRef) -> None:
    """DataError where a function gives rows without end, or more than fit into memory."""
    if count >= ref.max_rows:
        raise DataError(
            f"data.source {ref.source}: gives more than data.max_rows = {ref.max_rows:,} rows; let "
            "it end, or raise data.max_rows"
        )
    if count and count % A_LOOK == 0:
        check_taken(f"data.source {ref.source}: gave {count:,} rows,")


@dataclass
class _Where:
    """How far a function has come, as text for messages."""

    source: str
    rows: int = 0

    def __str__(self) -> str:
        after = f", after {self.rows} rows," if self.rows else ""
        return f"data.source {self.source}{after}"


def _checked_classes(given: Dataset, ref: DataRef) -> Dataset:
    if ref.classes and tuple(ref.classes) != given.classes:
        raise DataError(
            f"{ref.source}: its classes {list(given.classes)} are not data.classes {ref.classes}"
        )
    return given


def _checked_row(
    row: Any, number: int, names: dict[str, str], ref: DataRef, task: Task
) -> dict[str, Any]:
    """The values of a function's row by key. DataError where it has not all of them."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"data.source {ref.source}: row {number} is {str(row)[:40]!r} of type "
            f"{type(row).__name__}, not a dict"
        )
    check_no_labels(row, ref, task)
    for key, name in names.items():
        if name not in row:
            raise DataError(
                f"{ref.source}: row {number} has no {name!r} (data.columns.{key}); "
                f"it has {list(row)}"
            )
    return {key: row[name] for key, name in names.items()}


def block_of_records(
    rows: Sequence[Mapping[str, Any]],
    keys: Collection[str],
    name: str,
    ref: DataRef,
    first: int = 0,
    texts: Texts | None = None,
) -> Block:
    """The block of rows that a function gave; `inputs` are rows of steps of channel values.

    With `texts` rows are sentences. The first row has the number `first`.
    """
    columns = {key: [row[key] for row in rows] for key in keys}
    numbers = range(first, first + len(rows))
    if texts is None:
        inputs, unfit = _inputs(columns["inputs"], name, first)
    else:
        inputs, unfit = texts.inputs(columns["text"], first)
    valence = _valence(columns["valence"], name, first) if "valence" in columns else None
    return Block(
        first=first,
        inputs=inputs,
        label=encoded(labels.class_names(columns["label"], name, numbers)),
        split=encoded(text.split_names(columns["split"], name, ref)),
        group=encoded(text.group_keys(columns["group"])) if "group" in columns else None,
        valence=valence,
        unfit=unfit,
    )


def _steps_of(row: Any, number: int, name: str) -> NDArray[np.float32]:
    """(T, K): a row's inputs. DataError names the row."""
    try:
        if np.iscomplexobj(row):
            raise TypeError("they are complex")
        return np.asarray(row, np.float32)
    except Exception as error:  # whatever a user's object raises
        raise DataError(
            f"{name}: row {number}: inputs must be lists of steps of channel values: {error}"
        ) from None


def _inputs(rows: Sequence[Any], name: str, first: int) -> tuple[Ragged, tuple[Unfit, ...]]:
    """(the steps of every row, the rows that have none)."""
    steps = [
        _steps_of([] if row is None else row, number, name)
        for number, row in enumerate(rows, first)
    ]
    some = next((step.shape for step in steps if step.size), (0, 0))
    unfit = []
    for number, step in enumerate(steps, first):
        if len(step.shape) and not len(step):
            shape = step.shape if rows[number - first] is not None else ()
            unfit.append(Unfit(number, f"has shape {shape}, without any step"))
        elif step.ndim == 1:
            raise DataError(
                f"{name}: row {number}: inputs are one flat list of {len(step)} numbers; write a "
                "list of steps, each a list of channel values: [[0.1], [0.2]] is two steps of one "
                "channel"
            )
        elif step.ndim != 2 or step.shape[1] != some[-1]:
            raise DataError(
                f"{name}: inputs must be (steps, channels) with one channel count, but row "
                f"{number} has shape {step.shape} and row 0 {some}"
            )
    length = np.array([len(step) for step in steps], np.int64)
    full = [step for step in steps if len(step)]
    values = np.concatenate(full) if full else np.zeros((0, 0), np.float32)
    return Ragged(values, length), tuple(unfit)


def _valence(rows: Sequence[Any], name: str, first: int) -> Ragged:
    """One value a step of every row, NaN where it is missing."""
    values = []
    length = np.full(len(rows), MISSING, np.int64)
    for number, row in enumerate(rows):
        if row is None:
            continue
        try:
            values.append(np.asarray(row, np.float32).reshape(-1))
        except Exception as error:  # whatever a user's object raises
            raise DataError(
                f"{name}: row {first + number}, valence must be a list of numbers: {error}"
            ) from None
        length[number] = len(values[-1])
    return Ragged(np.concatenate(values) if values else np.zeros(0, np.float32), length)
