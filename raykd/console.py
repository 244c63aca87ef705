"""What a command prints: its result on stdout; progress on stderr as stage, done/total, rate and
time left, which is one rewritten line on a terminal and plain lines elsewhere.
"""

import io
import json
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from raykd.files.address import public_uri

MOST_BYTES = 2000  # of one message
SLOW_S = 1.0  # that a reader of stderr is waited for
# Controls but newline and tab, separators of lines, marks that turn the direction of text, and
# halves of characters.
UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
_results: list[TextIO] = []  # where `show` prints while stdout is its alone


def clean(text: str) -> str:
    """`text` as it may stand on a terminal: nothing hidden in it acts, and no password is told."""
    return _seen(public_uri(text))


def _seen(text: str) -> str:
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _public(result: Any) -> Any:
    """A JSON value without the passwords that its texts may hold."""
    if isinstance(result, dict):
        return {_public(key): _public(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [_public(value) for value in result]
    return public_uri(result) if isinstance(result, str) else result


def tell(text: str) -> None:
    """One message on stderr: clean, and cut where it is long."""
    data = clean(text).encode()
    if len(data) > MOST_BYTES:
        kept = data[:MOST_BYTES].decode(errors="ignore")
        data = f"{kept}... and {len(data) - MOST_BYTES:,} bytes more".encode()
    _print_aside(data.decode())


class Aside(io.FileIO):
    """stderr as a file that takes everything: what cannot be written there is lost, not raised.

    A full disk, a closed terminal or a reader that has gone ends no training.
    """

    def write(self, data: Any) -> int:
        """How many bytes are done with."""
        with suppress(OSError, ValueError):
            written = super().write(data)
            if written is None:  # its reader is slow, and it would not block
                select.select([], [self], [], SLOW_S)
                written = super().write(data)
            if written is not None:
                return written
        return memoryview(data).nbytes


def open_aside() -> None:
    """Let stderr take everything from now on, whoever writes to it; not where it is replaced."""
    if sys.stderr is sys.__stderr__:
        raw = io.BufferedWriter(Aside(2, "w", closefd=False))
        encoding = sys.stderr.encoding
        sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)


def silence(stream: TextIO) -> None:
    """Let what a stream still holds, whose reader has gone, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _print_aside(text: str, end: str = "\n") -> None:
    """Print on stderr, which may be closed, full or read by nobody."""
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):
        try:
            print(text, end=end, file=sys.stderr, flush=True)
        except UnicodeEncodeError:  # a terminal of few characters
            print(ascii(text)[1:-1], end=end, file=sys.stderr, flush=True)


class Progress:
    """The progress of one stage, printed at once, then every `every_s` seconds, and when done.

    `total` is None where nobody knows it, and may be set anew meanwhile.
    """

    def __init__(self, stage: str, total: int | None, unit: str, *, every_s: float | None = None):
        self.stage = stage
        self.total = total
        self.unit = unit
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.every_s = every_s if every_s is not None else (0.2 if self.terminal else 5.0)
        self.done = 0
        self.started = self.printed = time.monotonic()
        self._say("starting")

    def advance(self, done: int, note: str = "") -> None:
        """Set how many units are done, with a short remark."""
        self.done = done
        now = time.monotonic()
        is_open = self.total is None or done < self.total
        if now - self.printed >= self.every_s and is_open:
            self.printed = now
            self._say(f"{self._pace(now)} {note}")

    def finish(self, note: str = "") -> None:
        """Close the line with the time taken."""
        self.done = self.done if self.total is None else self.total
        self.total = self.done
        self._say(f"in {time.monotonic() - self.started:.1f} s {note}", last=True)

    def _pace(self, now: float) -> str:
        rate = self.done / max(now - self.started, 1e-9)
        if not rate:
            return "starting"
        pace = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        if self.total is None:
            return f"{pace} {self.unit}/s"
        left = (self.total - self.done) / rate
        return f"{pace} {self.unit}/s, {left:.0f} s left"

    def _say(self, text: str, last: bool = False) -> None:
        total = "?" if self.total is None else f"{self.total:,}"
        line = f"{self.stage:<7} {self.done:,}/{total} {self.unit} {text}".rstrip()
        end = "\n" if last or not self.terminal else ""
        line = clean(line)
        _print_aside(f"\r\x1b[K{line}" if self.terminal else line, end=end)


def say(stage: str, text: str) -> None:
    """One plain line about a stage."""
    _print_aside(clean(f"{stage:<7} {text}"))


def show(result: Any, text: str, as_json: bool) -> None:
    """Print a result on stdout: as one line of JSON for a script, or as text for a person."""
    stream = _results[-1] if _results else sys.stdout
    line = _seen(json.dumps(_public(result), sort_keys=True)) if as_json else clean(text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)  # stdout may be ASCII's
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Within it only `show` writes to stdout.

    What libraries and users' own code print goes to stderr, be it by `print`, by the file
    descriptor or from a process that they start.
    """
    try:
        kept = os.dup(1)
    except OSError:  # stdout is closed
        with redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    with os.fdopen(kept, "w", encoding=sys.stdout.encoding) as stream:
        _results.append(stream)
        os.dup2(2, 1)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            try:
                sys.stdout.flush()  # what was written to it behind our back
            except OSError:  # stderr takes nothing
                silence(sys.stdout)
                sys.stdout.flush()
            _results.pop()
            stream.flush()
            os.dup2(kept, 1)
