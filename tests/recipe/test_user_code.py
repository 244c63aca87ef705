"""What code of the user's raises has a name, and nothing that it changes stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raykd.errors import DataError, RecipeError
from raykd.files import stopping
from raykd.recipe.user_code import user_code

WHAT = "data.source mine:rows"


def leave():
    os._exit(7)


def recurse():
    recurse()


def raise_(error):
    raise error


class NoText(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (lambda: raise_(ValueError("no luck\nat all")), "raised ValueError: no luck (test_user"),
        (lambda: raise_(MemoryError()), "raised MemoryError"),
        (lambda: raise_(NoText()), "raised NoText"),
        (recurse, "raised RecursionError"),
        (lambda: sys.exit(143), "asked this process to exit (143)"),
        (leave, "asked this process to exit (7)"),
    ],
)
@pytest.mark.parametrize("error", [DataError, RecipeError])
def test_what_it_raises_is_one_line_with_its_name(does, words, error):
    with pytest.raises(error) as caught, user_code(WHAT, error):
        does()
    assert str(caught.value).startswith(f"{WHAT} ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os._exit is not leave


def test_errors_of_raykd_pass_as_they_are():
    with pytest.raises(DataError, match=r"^row 3$"), user_code(WHAT):
        raise DataError("row 3")


def test_the_directory_the_path_and_stdout_are_as_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    exit_before = os._exit
    with user_code(WHAT):
        assert sys.path == [*path, str(tmp_path)]
        os.chdir("/")
        print("from rows")
    assert Path.cwd() == tmp_path
    assert sys.path == path
    assert os._exit is exit_before
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "from rows\n")


def test_a_process_that_it_forks_does_leave():
    with user_code(WHAT):
        child = os.fork()
        if not child:
            os._exit(9)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9


@pytest.mark.parametrize(("sent", "raised"), [(True, "KeyboardInterrupt"), (False, "RecipeError")])
def test_only_a_signal_interrupts(sent, raised):
    code = f"""
import os, signal
from raykd.files import stopping
from raykd.recipe.user_code import user_code
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
stopping.watch()
try:
    with user_code("mine"):
        if {sent}:
            os.kill(os.getpid(), signal.SIGINT)
        raise KeyboardInterrupt
except BaseException as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == raised


def test_nobody_watches_unless_told(monkeypatch):
    monkeypatch.setattr(stopping, "_pipe", [])
    assert stopping.has_been_asked() is None
    with pytest.raises(KeyboardInterrupt), user_code(WHAT):
        raise KeyboardInterrupt
    assert signal.set_wakeup_fd(-1) == -1
