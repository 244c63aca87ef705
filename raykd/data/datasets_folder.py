"""A folder that Hugging Face `datasets` has saved (`save_to_disk`): which of its files are data.

dataset_dict.json    {"splits": ["train", "validation"]}, where there are several
train/state.json     names the split's Arrow files; others beside them are its cache
"""

import json
from collections.abc import Sequence

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


def _entries(files: DataFiles, file: DataFile) -> list[str]:
    try:
        state = json.loads(files.read(file, 0, file.bytes))
        return [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{files}/{file.name}: not the state of a saved data set ({error!r}); save it again"
        ) from None
