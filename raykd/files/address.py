"""Addresses of folders of files: a path of this machine, or s3://bucket/prefix."""

import re
from pathlib import Path

Address = Path | str  # a folder, or s3://bucket/prefix
URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[\w.=-]+)*/?", re.ASCII)


def is_url(address: Address) -> bool:
    """Whether an address is of another machine, not a folder's."""
    return isinstance(address, str) and "://" in address


def checked_address(address: str) -> str:
    """The address without a last slash. ValueError says what a URL must be like."""
    if is_url(address) and not URL.fullmatch(address):
        form = "s3://bucket/prefix of letters, digits and . _ = -"
        raise ValueError(f"must be a folder or {form}, found {address!r}")
    return address.rstrip("/") or address
