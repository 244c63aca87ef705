"""Which files of a source are data, and what their paths say of the rows in them.

A path gives a column by a folder `column=value`, and the split by a pattern of `data.splits`. Where
nothing else does, the split is that of the name, as the hub writes it: `train-00000-of-00002`,
`validation.jsonl` or a folder `test`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import unquote

from raykd.data import datasets_folder
from raykd.errors import DataError
from raykd.files.data_files import DataFile, DataFiles
from raykd.recipe.tables import DataRef

NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # a folder's name for null
HUB = {
    "train": "train",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
PARQUET = ".parquet"
ARROW = ".arrow"
LINES = (".jsonl", ".ndjson", ".json")
CSV = ".csv"
IN_FOLDERS = (PARQUET, ".jsonl", ".ndjson", CSV)  # read without a pattern, the first that is there


@dataclass(frozen=True)
class LaidFile:
    """A file of data, and what its path says of its rows."""

    file: DataFile
    values: Mapping[str, str | None]  # by column
    split: str | None = None  # by its name, where no column says it

    @property
    def kind(self) -> str:
        """The suffix, which says how it is read."""
        return PurePosixPath(self.file.name).suffix.lower()


def data_files(files: DataFiles, ref: DataRef, wanted: set[str]) -> list[LaidFile]:
    """The files of a source; `wanted` are the columns that are read.

    DataError where there is none, and where a pattern finds none.
    """
    listed = files.listed()
    if ref.splits:
        return _by_patterns(files, listed, ref, wanted)
    by_kind: dict[str, list[DataFile]] = {}
    for file in listed:
        by_kind.setdefault(PurePosixPath(file.name).suffix.lower(), []).append(file)
    saved = datasets_folder.data_files(files, listed) if PARQUET not in by_kind else []
    if saved:
        return [_laid(file, wanted) for file in saved]
    kinds = [kind for kind in IN_FOLDERS if kind in by_kind]
    if not kinds:
        others = ", ".join(f"*{kind}" for kind in IN_FOLDERS[1:])
        raise DataError(f"data.source {files}: no *.parquet file there, and no {others} either")
    if len(kinds) > 1 and kinds[0] != PARQUET:
        raise DataError(
            f"data.source {files}: holds {' and '.join(f'*{kind}' for kind in kinds)}; name the "
            'files that count: data.splits = { train = "train.csv", ... }'
        )
    return [_laid(file, wanted) for file in by_kind[kinds[0]]]


def _by_patterns(
    files: DataFiles, listed: Sequence[DataFile], ref: DataRef, wanted: set[str]
) -> list[LaidFile]:
    """The files that the patterns of `data.splits` find, in the order of their paths."""
    assert ref.splits is not None
    found: dict[DataFile, str] = {}
    for split, pattern in ref.splits.items():
        matches = pattern_test(pattern)
        chosen = [file for file in listed if matches(file.name)]
        if not chosen:
            raise DataError(
                f"data.splits.{split} = {pattern!r}: no file below {files} has such a path"
            )
        for file in chosen:
            if file in found:
                raise DataError(
                    f"data.splits: {file.name} is of {found[file]} and of {split}; write patterns "
                    "that share no file"
                )
            found[file] = split
    known = {PARQUET, ARROW, *LINES, CSV}
    for file in found:
        if PurePosixPath(file.name).suffix.lower() not in known:
            raise DataError(
                f"data.splits.{found[file]}: {file.name} is none of {', '.join(sorted(known))}"
            )
    laid = [_laid(file, wanted - {ref.columns.split}) for file in listed if file in found]
    column = ref.columns.split
    return [
        LaidFile(one.file, {**one.values, column: found[one.file]}, found[one.file]) for one in laid
    ]


def pattern_test(pattern: str) -> Callable[[str], bool]:
    """Whether a path fits: `*` stands for a part of a name, `**` for any folders."""
    wanted = pattern.removeprefix("./").split("/")

    def fits(parts: Sequence[str], left: Sequence[str]) -> bool:
        if not left:
            return not parts
        if left[0] == "**":
            return any(fits(parts[skipped:], left[1:]) for skipped in range(len(parts) + 1))
        return bool(parts) and fnmatchcase(parts[0], left[0]) and fits(parts[1:], left[1:])

    return lambda name: fits(name.split("/"), wanted)


def split_of_name(name: str) -> str | None:
    """The split that a path names: by the first word of its file, else of its nearest folder."""
    for part in reversed(name.split("/")):
        word = re.split(r"[-_. \d]", part, maxsplit=1)[0].lower()
        if word in HUB:
            return HUB[word]
    return None


def _laid(file: DataFile, wanted: set[str]) -> LaidFile:
    values: dict[str, str | None] = {}
    for part in file.name.split("/")[:-1]:
        column, sign, value = part.partition("=")
        if sign and column in wanted:
            values[column] = None if value == NO_VALUE else unquote(value)
    return LaidFile(file, values, split_of_name(file.name))
