"""What Hugging Face `datasets` writes: the files of a saved set, and its word for a missing label.

dataset_dict.json    {"splits": ["train", "validation"]}, where there are several
train/state.json     names the split's Arrow files; others beside them are its cache
"""

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raykd.errors import DataError
from raykd.files.data_files import DataFile, DataFiles

STATE = "state.json"


def data_files(files: DataFiles, listed: Sequence[DataFile]) -> list[DataFile]:
    """The Arrow files of a saved data set, in its order; none where the folder is no such set."""
    by_name = {file.name: file for file in listed}
    found = []
    for file in listed:
        folder, _, name = file.name.rpartition("/")
        if name != STATE or folder.count("/"):
            continue
        for entry in _entries(files, file):
            path = f"{folder}/{entry}".lstrip("/")
            if path not in by_name:
                raise DataError(f"{files}/{path}: {file.name} names it, and it is missing")
            found.append(by_name[path])
    return found


def is_class_label(schema: pa.Schema, column: str) -> bool:
    """Whether a file's own words say that a column is a ClassLabel."""
    told = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        return json.loads(told)["info"]["features"][column]["_type"] == "ClassLabel"
    except (ValueError, KeyError, TypeError):
        return False


def without_missing(labels: pa.Array) -> pa.Array:
    """The numbers of classes, null where a ClassLabel says that there is none."""
    is_missing = pc.call_function("equal", [labels, pa.scalar(-1, labels.type)])
    return pc.call_function("if_else", [is_missing, pa.scalar(None, labels.type), labels])


def _entries(files: DataFiles, file: DataFile) -> list[str]:
    try:
        state = json.loads(files.read(file, 0, file.bytes))
        return [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{files}/{file.name}: not the state of a saved data set ({error!r}); save it again"
        ) from None
