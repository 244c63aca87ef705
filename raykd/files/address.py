"""Addresses of folders of files: a path of this machine, or s3://bucket/prefix."""

import re
from pathlib import Path
from urllib.parse import urlsplit

# A password may hold any sign. A colon begins it unless a port follows, up to the path.
CREDENTIALS = re.compile(
    r"""//(?:[^/?#\s"']*|[^/?#\s"'@:]*:(?!\d{1,5}[/?#])\S*)@""",
)
SECRETS = re.compile(
    r"([?&;][^=&;\s]*(?:pass|pwd|token|secret|key|sig|auth|cred)[^=&;\s]*=)[^&\s]+", re.IGNORECASE
)
Address = Path | str  # a folder, or s3://bucket/prefix
URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[\w.=-]+)*/?", re.ASCII)


def public_uri(uri: str) -> str:
    """An address of any kind without the user, passwords and tokens that it may hold, be it before
    its host or in its query.
    """
    return SECRETS.sub(r"\1***", CREDENTIALS.sub("//", uri))


def checked_uri(uri: str) -> str:
    """A server's address as it is; ValueError if it cannot be one, such as with a port of 99999."""
    try:
        urlsplit(uri).port  # noqa: B018 - raises
    except ValueError as error:
        # Of what follows a colon Python's words tell a part, which may be a password's.
        why = "its host or port cannot be read" if "@" in uri else error
        raise ValueError(f"{public_uri(uri)!r:.100} is no address: {why}") from None
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
