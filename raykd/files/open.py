"""The place that an address names: a folder of this machine, or a prefix of a bucket."""

from pathlib import Path

from raykd.files.address import Address, checked_address, is_url
from raykd.files.place import Place


def open_place(address: Address | Place) -> Place:
    """The place that an address names; a place is itself.

    ValueError for a URL that cannot be one.
    """
    if not isinstance(address, Path | str):
        return address
    if is_url(address):
        from raykd.files.bucket import Bucket

        bucket, _, prefix = checked_address(str(address)).removeprefix("s3://").partition("/")
        return Bucket(bucket, prefix)
    from raykd.files.folder import Folder

    return Folder(Path(address))


def address_below(home: Address, name: str) -> Address:
    """The address of a folder in a place."""
    return open_place(home).below(name).address
