"""The sqlite file of MLflow, read without MLflow: whether it is one, and whether anything was ever
recorded in it.
"""

import sqlite3
from collections.abc import Mapping, Set
from contextlib import closing
from pathlib import Path

# what MLflow itself writes into a new file
FILLED_BY_MLFLOW = {"alembic_version": 1, "experiments": 1, "workspaces": 1}

VERSION = "alembic_version"


def check(file: Path, tables: Mapping[str, Set[str]]) -> None:
    """OSError if a file holds what another program wrote, or is no data base. Nothing is changed.

    `tables` has the columns of MLflow's, which tell them from others of the same name while MLflow
    has not written its version down.
    """
    try:
        with closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        ) as connection:
            found = {name for name in _tables(connection) if not name.startswith("_alembic_tmp_")}
            foreign = found - tables.keys() - {VERSION}
            if VERSION not in found:
                ours = found - foreign
                foreign |= {name for name in ours if _columns(connection, name) - tables[name]}
    except sqlite3.Error as error:
        raise OSError(f"{file}: {error}") from error
    if foreign:
        names = ", ".join(sorted(foreign)[:3])
        raise OSError(
            f"{file} is no file of MLflow's: it holds {names}; name another, or move it away"
        )


def is_unused(file: Path) -> bool:
    """Whether a file holds tables that nobody has written to; False where that cannot be told."""
    try:
        with closing(sqlite3.connect(file)) as connection:
            for name in _tables(connection):
                rows = connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
                if rows > FILLED_BY_MLFLOW.get(name, 0):
                    return False
    except sqlite3.Error:
        return False
    return True


def drop_tables(file: Path) -> None:
    """Leave the file empty. OSError if it is locked, or damaged.

    It stays the same file, because connections to it may be open.
    """
    try:
        with closing(sqlite3.connect(file)) as connection, connection:
            for name in _tables(connection):
                connection.execute(f'DROP TABLE "{name}"')
    except sqlite3.Error as error:
        raise OSError(f"{file}: {error}") from error


def _tables(connection: sqlite3.Connection) -> list[str]:
    kept = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    return [name for (name,) in connection.execute(kept)]


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {
        name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", [table])
    }
