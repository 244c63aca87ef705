"""The command line's verbs for one store: verify, show, repair, gc."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from raykd.console import show


@click.group()
def store() -> None:
    """A teacher store: verify, show, repair, gc."""


class StorePath(click.Path):
    """A store's folder, or its s3:// URL unchanged."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from raykd.files.address import checked_address, is_url

        if not is_url(value):
            path = super().convert(value, param, ctx)
            if not Path(os.fsdecode(path)).is_dir():
                self.fail(f"{value!r} is no folder", param, ctx)
            return path
        try:
            return checked_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


STORE = StorePath(path_type=Path, exists=True, file_okay=False)


def store_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb for one store, a folder or an s3:// URL; `function` returns (result, text)."""

    @store.command(function.__name__.rstrip("_"), help=function.__doc__)
    @click.argument("folder", metavar="PATH", type=STORE)
    @click.option("--json", "as_json", is_flag=True, help="The result on stdout as one JSON value.")
    @wraps(function)
    def command(folder: Path | str, as_json: bool) -> None:
        result, text = function(folder)
        show(result, text, as_json)

    return command


@store_command
def verify(folder: Path | str) -> tuple[Any, str]:
    """Every file against its digest. Exit code 3 if the store is incomplete or damaged."""
    from raykd.errors import StoreError
    from raykd.store import care

    result = care.verify(folder)
    if result["damaged"]:
        faults = "\n".join(f"  {fault['file']}: {fault['fault']}" for fault in result["damaged"])
        raise StoreError(f"{folder}:\n{faults}\ntype: raykd store repair {folder}")
    if not result["complete"]:
        raise StoreError(
            f"{folder}: {result['shards']} shards are sound, but it is not complete; "
            f"{care.rewriting_hint(folder)}"
        )
    return result, f"{result['shards']} shards, complete and sound"


@store_command
def show_(folder: Path | str) -> tuple[Any, str]:
    """What it holds: identity, splits, and each column with its bytes a row."""
    from raykd.store import care

    result = care.show(folder)
    lines = [f"{folder}: {'complete' if result['complete'] else 'incomplete'}"]
    for name, split in result["splits"].items():
        lines.append(f"{name:<14}{split['rows']:>12,} rows{split['bytes']:>16,} bytes")
    for name, column in result["columns"].items():
        width = f"{column['bytes_per_row']:>12,} bytes a row"
        lines.append(f"{name:<20}{column['type']:<10}{width}")
    lines += [f"not scored: row {row['row_id']}: {row['reason']}" for row in result["quarantined"]]
    lines += [f"cannot be read: {name}" for name in result["unreadable"]]
    return result, "\n".join(lines)


@store_command
def repair(folder: Path | str) -> tuple[Any, str]:
    """Remove damaged shards, so that scoring does just these again."""
    from raykd.store import care

    removed = care.repair(folder)
    text = "nothing is damaged"
    if removed:
        text = f"removed {', '.join(removed)}; to write them again, {care.rewriting_hint(folder)}"
    return {"removed": removed}, text


@store.command()
@click.argument("folder", metavar="PATH", type=STORE)
@click.option(
    "--older-than", default=24.0, help="Hours that a file must have stood.", show_default=True
)
@click.option("--force", is_flag=True, help="Allow less than an hour: no writer is at work.")
@click.option("--json", "as_json", is_flag=True, help="The result on stdout as one JSON value.")
def gc(folder: Path | str, older_than: float, force: bool, as_json: bool) -> None:
    """Remove what killed writers left behind: shards that no commit record names."""
    from raykd.store import care

    removed = care.gc(folder, older_than_s=3600 * older_than, force=force)
    show({"removed": removed}, "\n".join(removed) or "nothing to remove", as_json)
