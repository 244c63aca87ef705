"""What a command prints: its result on stdout; progress on stderr as stage, done/total, rate and
time left, which is one rewritten line on a terminal and plain lines elsewhere.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

_results: list[TextIO] = []  # where `show` prints while stdout is its alone


class Progress:
    """The progress of one stage, printed at once, then every `every_s` seconds, and when done."""

    def __init__(self, stage: str, total: int, unit: str, *, every_s: float | None = None):
        self.stage = stage
        self.total = total
        self.unit = unit
        self.terminal = sys.stderr.isatty()
        self.every_s = every_s if every_s is not None else (0.2 if self.terminal else 5.0)
        self.done = 0
        self.started = self.printed = time.monotonic()
        self._say("starting")

    def advance(self, done: int, note: str = "") -> None:
        """Set how many units are done, with a short remark."""
        self.done = done
        now = time.monotonic()
        if now - self.printed >= self.every_s and done < self.total:
            self.printed = now
            self._say(f"{self._pace(now)} {note}")

    def finish(self, note: str = "") -> None:
        """Close the line with the time taken."""
        self.done = self.total
        self._say(f"in {time.monotonic() - self.started:.1f} s {note}", last=True)

    def _pace(self, now: float) -> str:
        rate = self.done / max(now - self.started, 1e-9)
        if not rate:
            return "starting"
        left = (self.total - self.done) / rate
        pace = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"{pace} {self.unit}/s, {left:.0f} s left"

    def _say(self, text: str, last: bool = False) -> None:
        line = f"{self.stage:<7} {self.done:,}/{self.total:,} {self.unit} {text}".rstrip()
        end = "\n" if last or not self.terminal else ""
        print(f"\r\x1b[K{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


def say(stage: str, text: str) -> None:
    """One plain line about a stage."""
    print(f"{stage:<7} {text}", file=sys.stderr, flush=True)


def show(result: Any, text: str, as_json: bool) -> None:
    """Print a result on stdout: as one line of JSON for a script, or as text for a person."""
    stream = _results[-1] if _results else sys.stdout
    line = json.dumps(result, sort_keys=True) if as_json else text
    print(line, file=stream, flush=True)


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
            sys.stdout.flush()  # what was written to it behind our back
            _results.pop()
            stream.flush()
            os.dup2(kept, 1)
