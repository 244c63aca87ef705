"""A prefix of an S3 bucket as a store's place.

A conditional PUT (`If-None-Match: *`) creates a name once.

Region and credentials come from the environment: AWS_ACCESS_KEY_ID and its like, a web identity,
or the role of a container or machine. AWS_ENDPOINT_URL names another server that speaks S3. Every
wait has an end.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

from raykd.errors import InfraError
from raykd.files.place import Listed, Record

CLIENT: Any = {"connect_timeout": "5s", "timeout": "120s"}  # of one request, its body included
LISTED_AT_ONCE = 1000  # objects, as a server's page holds them
RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
ATTEMPTS = 3  # at a name whose other creator gave up
SEEN: set[str] = set()  # buckets that have refused this process to create a name twice


@dataclass(frozen=True)
class Bucket:
    """Objects below a prefix."""

    bucket: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def address(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    def below(self, name: str) -> "Bucket":
        return Bucket(self.bucket, f"{self.prefix}/{name}".lstrip("/"))

    def put_once(self, name: str, data: bytes) -> bool:
        """Create an object unless it exists.

        False, too, for a call that created it but lost the answer.
        """
        created = self._create(name, data)
        if created and self.bucket not in SEEN and self._create(name, data):
            raise InfraError(
                f"{self}: the server creates an object twice, so no store is safe there; name one "
                "that honours If-None-Match, as Amazon S3 does, in AWS_ENDPOINT_URL"
            )
        SEEN.add(self.bucket)
        return created

    def _create(self, name: str, data: bytes) -> bool:
        """Whether this call created an object.

        It is tried again if it collides with a creation that then fails.
        """
        from obstore.exceptions import AlreadyExistsError

        for _ in range(ATTEMPTS):
            with self._requests(name) as (api, client):
                try:
                    api.put(client, name, data, mode="create", use_multipart=False)
                    return True
                except AlreadyExistsError:
                    if self._exists(name):
                        return False
        raise InfraError(
            f"{self}/{name}: collided with other writers {ATTEMPTS} times; give the same command "
            "again"
        )

    def _exists(self, name: str) -> bool:
        with self._requests(name) as (api, client):
            try:
                return bool(api.head(client, name))
            except FileNotFoundError as error:
                _no_bucket(self, error)
                return False

    def put(self, name: str, data: bytes) -> None:
        with self._requests(name) as (api, client):
            api.put(client, name, data, use_multipart=False)

    def get(self, name: str, *, last: int | None = None) -> bytes | None:
        options = {} if last is None else {"range": {"suffix": last}}
        with self._requests(name) as (api, client):
            try:
                return bytes(api.get(client, name, options=options).bytes())
            # ValueError: a name that no object can have
            except (FileNotFoundError, ValueError) as error:
                _no_bucket(self, error)
                return None

    def range_of(self, name: str, first: int, count: int) -> tuple[bytes, str] | None:
        """(`count` bytes of an object from the byte `first` on, its ETag); None if it is gone.

        Fewer bytes, where the object ends before.
        """
        with self._requests(name) as (api, client):
            try:
                options = {"range": (first, first + count)} if count else {"head": True}
                answer = api.get(client, name, options=options)
                return bytes(answer.bytes()), answer.meta["e_tag"] or ""
            except FileNotFoundError as error:
                _no_bucket(self, error)
                return None

    def delete(self, name: str) -> None:
        with self._requests(name) as (api, client):
            api.delete(client, name)

    def listed(self, below: str = "") -> dict[str, Listed]:
        files = {
            o["path"]: Listed(o["size"], o["last_modified"].timestamp(), o["e_tag"] or "")
            for o in self._objects(below)
        }
        names = sorted(files)
        return files if names == list(files) else {name: files[name] for name in names}

    def _objects(self, below: str) -> Iterator[Any]:
        """What the server tells of each object, as it tells it: a million take a gigabyte."""
        with self._requests(below) as (api, client):
            for some in api.list(client, below or None, chunk_size=LISTED_AT_ONCE):
                yield from some

    def folders(self, below: str = "") -> list[str]:
        with self._requests(below) as (api, client):
            prefixes = api.list_with_delimiter(client, below or None)["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in prefixes)

    @property
    def is_near(self) -> bool:
        return False

    def lacking(self, records: Iterable[Record]) -> Iterator[Record]:
        """Those whose object has another size. Digests are checked on fetching."""
        sizes = {o["path"]: o["size"] for o in self._objects("data")}
        return (record for record in records if sizes.get(record["file"]) != record["bytes"])

    @contextmanager
    def _requests(self, name: str) -> Iterator[tuple[Any, Any]]:
        """(the package's functions, a client of this prefix); a failure raises InfraError."""
        api = _package(str(self))
        from obstore.exceptions import BaseError

        try:
            yield api, _client(self.bucket, self.prefix, os.environ.get("AWS_ENDPOINT_URL"))
        except (BaseError, FileNotFoundError, ValueError) as error:
            _no_bucket(self, error)
            raise InfraError(
                f"{self}/{name}: {_reason(error)}; check the server and AWS_ENDPOINT_URL, "
                "AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then give the same "
                "command, which continues from here"
            ) from None


def _no_bucket(place: Bucket, error: BaseException) -> None:
    """InfraError if it is the bucket that is missing."""
    if "<Code>NoSuchBucket</Code>" in str(error):
        raise InfraError(
            f"{place}: there is no bucket {place.bucket!r}; create it, or name another"
        ) from None


def _reason(error: BaseException) -> str:
    """The first line of the package's message, and the server's code, such as AccessDenied."""
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    line = str(error).partition("\n")[0].partition("<?xml")[0].strip(" :")
    return f"{line} ({code[1]})" if code else line


def _package(address: str) -> Any:
    try:
        import obstore
    except ModuleNotFoundError:
        raise InfraError(
            f"{address} needs the package obstore; type: pip install 'raykd[s3]'"
        ) from None
    return obstore


@lru_cache
def _client(bucket: str, prefix: str, endpoint: str | None) -> Any:
    """A client, made once a process. Plain HTTP only if the user's endpoint asks for it."""
    from obstore.store import S3Store

    plain = bool(endpoint and endpoint.startswith("http://"))
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options=CLIENT | {"allow_http": plain},
        retry_config=RETRY,
    )
