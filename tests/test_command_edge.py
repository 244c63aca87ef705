"""How every command ends: one clean message and its code, whatever was raised or closed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raykd import console
from raykd.files.address import checked_uri, public_uri

ROOT = Path(__file__).parents[1]
SCRIPT = "from raykd import cli\n{}\ncli.main()\n"


def command(
    *argv: str, before: str = "", shell: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`raykd ARGV` in a new process, after some lines of Python and under redirections."""
    asked = [sys.executable, "-P", "-c", SCRIPT.format(before), *argv]
    return subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", *asked],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def raising(what: str) -> str:
    """Lines after which the list of techniques raises."""
    return f"""
from raykd import techniques
def fail():
    {what}
techniques.all_techniques = fail
"""


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("raise ZeroDivisionError('no luck')", 5, "ZeroDivisionError: no luck"),
        ("fail()", 5, "RecursionError"),
        ("raise MemoryError", 5, "MemoryError"),
        ("import sys; sys.exit(143)", 3, "SystemExit"),
        ("raise KeyboardInterrupt", 3, "KeyboardInterrupt|Abort"),
    ],
)
def test_an_error_without_a_message_of_its_own_is_one_line_and_a_code(what, code, words):
    done = command("techniques", before=raising(what))
    assert done.returncode == code, done.stderr
    assert any(word in done.stderr for word in words.split("|"))
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_its_traceback_is_there_for_who_asks():
    done = command("techniques", before=raising("1 / 0"), RAYKD_TRACEBACK="1")
    assert done.returncode == 5
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("shell", ["<&- >&- 2>&-", ">&-", "2>&-", "| true"])
def test_what_is_closed_changes_no_exit_code_and_is_quiet(shell):
    done = command("techniques", shell=shell)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["2>/dev/full", "2</dev/null"])
def test_what_stderr_does_not_take_is_lost_and_changes_no_exit_code(shell):
    """A full disk below a log; before, training ended and every code was 1."""
    assert command("nonsense", shell=shell).returncode == 2
    noisy = """
from raykd.recipe.user_code import user_code
def listed():
    with user_code("mine"):
        print("noise")
        print("noise" * 9999, file=sys.stderr, flush=True)
    with console.stdout_for_results():
        sys.__stdout__.write("behind our back")
    console.Progress("train", 3, "steps", every_s=0).advance(1)
    return []
import sys
from raykd import console, techniques
techniques.all_techniques = listed
"""
    done = command("techniques", "--json", before=noisy, shell=shell, PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout) == (0, "[]\n")


def test_progress_needs_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    console.Progress("train", 3, "steps", every_s=0).advance(1)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        console.Progress("train", 3, "steps", every_s=0).advance(1)
        console.say("train", "noise" * 9999)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_reader_that_is_slow_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(console, "SLOW_S", 0.01)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with console.Aside(theirs, "w") as aside:
        for _ in range(40):
            assert aside.write(b"x" * 4096) == 4096
        assert len(os.read(ours, 1 << 20)) == 1 << 16
        os.close(ours)
        assert aside.write(b"gone") == 4


def test_a_usage_error_is_escaped_and_cut():
    done = command("\x1b[2J\u202e" + "x" * 100_000)
    assert done.returncode == 2
    assert "\\x1b[2J\\u202e" in done.stderr
    assert len(done.stderr) < 2100
    assert "bytes more" in done.stderr


def test_a_thread_that_stays_does_not_keep_the_command():
    before = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()"
    assert command("techniques", before=before).returncode == 0


def test_a_library_in_the_current_directory_is_not_run(tmp_path):
    for name in ("pydantic", "random", "click"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    done = command("techniques", before=f"import os; os.chdir({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr


ADDRESSES = {
    "http://me:secret@host/x": "http://host/x",
    "http://me:se/cr?e#t'\"@host:80/x": "http://host:80/x",
    "http://se@cret@host": "http://host",
    "http://host:80/path@v1": "http://host:80/path@v1",
    "http://host/path@v1?x=1": "http://host/path@v1?x=1",
    "postgresql://h/db?sslmode=require&password=se'c\"r/e#t": (
        "postgresql://h/db?sslmode=require&password=***"
    ),
    "http://h/?auth_token=secret&a=1;Api_Key=secret": "http://h/?auth_token=***&a=1;Api_Key=***",
    "http://h?X-Amz-Signature=secret&X-Amz-Credential=secret": (
        "http://h?X-Amz-Signature=***&X-Amz-Credential=***"
    ),
    "sqlite:////a%3Fb/mlflow.db": "sqlite:////a%3Fb/mlflow.db",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_told_without_its_secrets(address, capsys):
    public = ADDRESSES[address]
    assert public_uri(address) == public
    console.tell(f"raykd: {address} is down")
    assert capsys.readouterr().err == f"raykd: {public} is down\n"
    console.show({"a": [{address: address}], "b": "x@y"}, "", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": [{public: public}], "b": "x@y"}


@pytest.mark.parametrize("address", ["http://me:se/cr@host", "http://me:secret@[::1"])
def test_what_is_no_address_is_told_without_its_secrets(address):
    with pytest.raises(ValueError, match="is no address") as caught:
        checked_uri(address)
    assert "se" not in str(caught.value).partition(" is no address: ")[0]
    assert "cannot be read" in str(caught.value)
    with pytest.raises(ValueError, match="is no address: Port out of range"):
        checked_uri("http://localhost:99999")


def test_results_hide_passwords_and_stay_json(capsys):
    console.show({"uri": "http://me:secret@host/x", "text": "\u202e"}, "", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"uri": "http://host/x", "text": "\u202e"}
    console.show({}, "http://me:secret@host/x \x1b[2J", as_json=False)
    assert capsys.readouterr().out == "http://host/x \\x1b[2J\n"
