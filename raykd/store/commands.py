"""The command line's verbs over one store: verify, show, repair, gc."""

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
    """A store's folder, or its s3:// URL as it stands."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from raykd.files.address import checked_address, is_url

        if not is_url(value):
            return super().convert(value, param, ctx)
        try:
            return checked_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


STORE = StorePath(path_type=Path, exists=True, file_okay=False)


def store_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb over one store, a folder or an s3:// URL; it gives (result, text)."""

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

    found = care.verify(folder)
    if found["damaged"]:
        faults = "\n".join(f"  {d['file']}: {d['fault']}" for d in found["damaged"])
        raise StoreError(f"{folder}:\n{faults}\ntype: raykd store repair {folder}")
    if not found["complete"]:
        raise StoreError(
            f"{folder}: {found['shards']} shards are sound, but it is not complete; {care.again(folder)}"
        )
    return found, f"{found['shards']} shards, complete and sound"


@store_command
def show_(folder: Path | str) -> tuple[Any, str]:
    """What it holds: identity, splits, and each column with its bytes a row."""
    from raykd.store import care

    found = care.show(folder)
    lines = [f"{folder}: {'complete' if found['complete'] else 'incomplete'}"]
    lines += [
        f"{name:<14}{p['rows']:>12,} rows{p['bytes']:>16,} bytes"
        for name, p in found["splits"].items()
    ]
    lines += [
        f"{name:<20}{c['type']:<10}{c['bytes_per_row']:>12,} bytes a row"
        for name, c in found["columns"].items()
    ]
    lines += [f"not scored: row {row['row_id']}: {row['reason']}" for row in found["quarantined"]]
    lines += [f"can not be read: {name}" for name in found["unreadable"]]
    return found, "\n".join(lines)


@store_command
def repair(folder: Path | str) -> tuple[Any, str]:
    """Remove damaged shards, so that scoring does just these again."""
    from raykd.store import care

    removed = care.repair(folder)
    text = "nothing is damaged"
    if removed:
        text = f"removed {', '.join(removed)}; to write them again, {care.again(folder)}"
    return {"removed": removed}, text


@store.command()
@click.argument("folder", metavar="PATH", type=STORE)
@click.option(
    "--older-than", default=24.0, help="Hours that a file must have stood.", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="The result on stdout as one JSON value.")
def gc(folder: Path | str, older_than: float, as_json: bool) -> None:
    """Remove what killed writers left behind: files that no commit record names."""
    from raykd.store import care

    removed = care.gc(folder, older_than_s=3600 * older_than)
    show({"removed": removed}, "\n".join(removed) or "nothing to remove", as_json)
