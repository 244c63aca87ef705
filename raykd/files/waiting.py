"""Waits that end, for a dead or slow server or another process; several waits at a time."""

import fcntl
import os
import socket
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}
Item = TypeVar("Item")
T = TypeVar("T")


def bounded(work: Callable[[], T], limit_s: float) -> T:
    """What `work` returns.

    TimeoutError after `limit_s`, even where a call has no timeout itself, as a name look-up.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(timeout=max(limit_s, 0))


def in_turn(work: Callable[[Item], T], items: Iterable[Item], at_a_time: int) -> Iterator[T]:
    """What `work` gives for each item, in their order, by several threads where there are many.

    A few results are ahead at most.
    """
    if at_a_time == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(at_a_time) as threads:
        ahead: deque[Future[T]] = deque()
        try:
            for item in items:
                ahead.append(threads.submit(work, item))
                if len(ahead) > at_a_time:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def knock(uri: str, limit_s: float) -> None:
    """OSError if nobody listens at `uri`. Nothing is tried behind a proxy or on an unknown port."""
    parts = urlsplit(uri)
    host = parts.hostname or ""
    scheme = parts.scheme.split("+")[0]
    port = parts.port or PORTS.get(scheme)
    proxied = scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    if port and not proxied:
        socket.create_connection((host, port), timeout=limit_s).close()


def unseen_files(files: list[str], word: str, patience_s: float = 5.0) -> list[str]:
    """Those of the files in which this node cannot read the word; a network's disk may be late.

    It stands here, where nothing imports torch: a node that is asked starts a process for it.
    """
    end = time.monotonic() + patience_s
    while True:
        unseen = [file for file in files if not _reads(Path(file), word)]
        if not unseen or time.monotonic() > end:
            return unseen
        time.sleep(0.2)


def _reads(file: Path, word: str) -> bool:
    try:
        return file.read_text() == word
    except OSError:
        return False


@contextmanager
def locked(folder: Path, *, wait: bool = False, limit_s: float = float("inf")) -> Iterator[None]:
    """Hold a lock on `folder`.

    BlockingIOError if another process has it and `wait` is False, or has it for `limit_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if wait and limit_s < float("inf"):
            _lock_within(handle, folder, limit_s)
        else:
            _lock(handle, folder, wait)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise BlockingIOError(f"{folder} is in use by another process") from None


def _lock_within(handle: int, folder: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return _lock(handle, folder, wait=False)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(min(0.1, limit_s))
