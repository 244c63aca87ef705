"""Whether a signal has asked this process to stop, by whichever handler it was taken.

Code that a recipe names can raise SystemExit and KeyboardInterrupt just as handlers do. Only the
interpreter itself knows which of them a signal caused.
"""

import os
import signal
import sys
from contextlib import suppress
from typing import Any

_pipe: list[int] = []
_arrived: set[int] = set()


def watch() -> None:
    """Note from now on every signal that has a handler. For the main thread only.

    SIGTERM then exits with 143.
    """
    _arrived.clear()
    if not _pipe:
        _pipe.extend(os.pipe())
        for end in _pipe:
            os.set_blocking(end, False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _stop(number: int, _frame: Any) -> None:
    _arrived.add(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(143)


def has_been_asked() -> bool | None:
    """Whether SIGINT or SIGTERM has arrived; None where nobody watches."""
    if not _pipe:
        return None
    with suppress(BlockingIOError):
        while numbers := os.read(_pipe[0], 64):
            _arrived.update(numbers)
    return bool(_arrived & {signal.SIGINT, signal.SIGTERM})
