"""Addresses of folders of files: a path of this machine, or s3://bucket/prefix."""

import re
from pathlib import Path
from urllib.parse import urlsplit

CREDENTIALS = re.compile(r"//[^/?#\s\"']*@")
Address = Path | str  # a folder, or s3://bucket/prefix
URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[\w.=-]+)*/?", re.ASCII)


def public_uri(uri: str) -> str:
    """An address of any kind without the user and password that it may hold."""
    return CREDENTIALS.sub("//", uri)


def checked_uri(uri: str) -> str:
    """A server's address as it is; ValueError if it cannot be one, such as with a port of 99999."""
    try:
        urlsplit(uri).port  # noqa: B018 - raises
    except ValueError as error:
        raise ValueError(f"{public_uri(uri)!r:.100} is no address: {error}") from None
    return uri


def is_url(address: Address) -> bool:
    """Whether an address is of another machine, not a folder's."""
    return isinstance(address, str) and "://" in address


def checked_address(address: str) -> str:
    """The address without a last slash. ValueError says what a URL must be like."""
    if is_url(address) and not URL.fullmatch(address):
        form = "s3://bucket/prefix of letters, digits and . _ = -"
        text = f"must be a folder or {form}, found {address!r}"
        bucket = address.removeprefix("s3://").partition("/")[0]
        if address.startswith("s3://") and not URL.fullmatch(f"s3://{bucket}"):
            text += (
                f"; a bucket's name, here {bucket!r}, has 3 to 63 lower-case letters, digits, dots "
                "and hyphens, the first and the last no dot and no hyphen"
            )
        raise ValueError(text)
    return address.rstrip("/") or address
