"""Code that a recipe names, while it runs: what it raises has a name, and it leaves no mess."""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import NoReturn

from raykd.errors import Problem, RaykdError, RecipeError
from raykd.files import stopping


@contextmanager
def user_code(what: object, error: type[RaykdError] = RecipeError) -> Iterator[None]:
    """Run code of the user's, which the text of `what` names for messages by its key.

    Whatever it raises, and its leaving of the process, becomes an `error`. What it prints goes to
    stderr. The current directory is the same again afterwards. Modules of that directory are found
    after all others meanwhile. A thread that it leaves behind does not keep the process from
    ending. Errors of raykd's own and signals pass.

    Example:
        >>> with user_code("student.model mine:build"):
        ...     [].pop()
        Traceback (most recent call last):
        raykd.errors.RecipeError: student.model mine:build raised IndexError: pop from empty list
    """
    folder = os.open(".", os.O_RDONLY)
    leave = os._exit
    os._exit = _caught(os.getpid(), leave)
    try:
        with current_directory_last(), redirect_stdout(sys.stderr), _threads_that_may_be_left():
            yield
    except (RaykdError, GeneratorExit):
        raise
    except BaseException as raised:
        if is_a_signals(raised):
            raise
        raise _named(what, raised, error) from raised
    finally:
        os._exit = leave
        os.fchdir(folder)
        os.close(folder)


@contextmanager
def current_directory_last() -> Iterator[None]:
    """Find modules of the current directory, after all others, however Python was started."""
    path = os.getcwd()
    if {"", path} & set(sys.path):
        yield
        return
    sys.path.append(path)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(path)


@contextmanager
def _threads_that_may_be_left() -> Iterator[None]:
    """Threads started within it do not keep the process from ending."""
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        thread.daemon = True
        start(thread)

    threading.Thread.start = started  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


def _caught(owner: int, leave: Callable[[int], NoReturn]) -> Callable[[int], NoReturn]:
    """os._exit as an exception in the process `owner`; a process forked from it does leave."""

    def raise_exit(status: int) -> NoReturn:
        if os.getpid() != owner:
            leave(status)
        raise SystemExit(status)

    return raise_exit


def is_a_signals(raised: BaseException) -> bool:
    """Whether a handler raised it: one of ours, or of a Ray process."""
    if isinstance(raised, Exception):
        return False
    asked = stopping.has_been_asked()
    if isinstance(raised, KeyboardInterrupt):
        return asked is not False
    return bool(asked) or hasattr(raised, "ray_terminate_msg")


def _named(what: object, raised: BaseException, error: type[RaykdError]) -> RaykdError:
    """The error that says in one line what a user's code raised, and where."""
    try:
        lines = str(raised).strip().splitlines()
    except Exception:
        lines = []
    text = f"{what} raised {type(raised).__name__}"
    if isinstance(raised, SystemExit):
        text = f"{what} asked this process to exit ({raised.code!r}); let it return or raise"
    elif lines:
        text += f": {lines[0]}"
    frames = traceback.extract_tb(raised.__traceback__)
    if len(frames) > 1 and not isinstance(raised, SyntaxError):
        text += f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
    return error([Problem("", text)]) if issubclass(error, RecipeError) else error(text)
