"""Links: a folder of raykd's may hold some that lead to its own files, and none that lead out."""

import os
import stat
from pathlib import Path

from raykd.errors import StoreError


def check_inside(path: Path, folder: Path) -> None:
    """StoreError if `path` leads out of `folder` by a link."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise StoreError(f"{path} cannot be followed: {error}; delete that link") from None
    if not target.is_relative_to(folder.resolve()):
        raise StoreError(
            f"{path} is or lies below a link to {target}, outside of {folder}, so it is not read; "
            "delete the link, or put the file itself there"
        )


def check_tree(folder: Path) -> None:
    """StoreError if something below `folder` is a link that leads out of it, or is no file at all.

    The latter are pipes, sockets and devices, whose reading may never end.
    """
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # removed meanwhile
                continue
            if stat.S_ISLNK(mode):
                check_inside(path, folder)
            elif not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise StoreError(f"{path} is neither a file nor a folder; delete it")
