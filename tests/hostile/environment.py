"""Environments as no command wants them: dead addresses, long paths, closed streams."""

import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

from hostile.harness import UNSET, Asked, Done, Home, add, hostile

PLAIN = {
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": UNSET,
}


def dead_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def addressed(address: str, home: Home) -> Asked:
    where = address.format(port=dead_port())
    return home.asked("score", "done.toml", code=5, words=where, env={"RAY_ADDRESS": where})


for _address in (
    "127.0.0.1:{port}",
    "ray://127.0.0.1:{port}",
    "nonsense://x",
    "http://[::1",
):
    add("environment", f"RAY_ADDRESS at {_address}", partial(addressed, _address))


@hostile("environment")
def a_dead_address_on_the_command_line(home: Home) -> Asked:
    options = ("--address", f"127.0.0.1:{dead_port()}")
    return home.asked("score", "done.toml", code=5, words=options[1], options=options)


def long_folder(name: str, home: Home) -> Asked:
    folder = home.root / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    return home.asked("score", "done.toml", code=5, words=(name, "107"), env={name: str(folder)})


for _name in ("RAY_TMPDIR", "TMPDIR"):
    add("environment", f"{_name} of 120 letters", partial(long_folder, _name))


def examined(env: dict[str, str], options: tuple[str, ...], home: Home) -> Asked:
    def check(_home: Home, done: Done) -> list[str]:
        return ["the password is printed"] if "hunter2" in done.out + done.err else []

    return Asked(("doctor", "--out", home.out, *options), (0, 2, 5), env=env, check=check)


DOCTORS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "a tracker without end": ({}, ("--uri", "http://[::1")),
    "a tracker at port 99999": ({}, ("--uri", "http://localhost:99999")),
    "a tracker with a password": ({}, ("--uri", "http://user:hunter2@127.0.0.1:9")),
    "a Ray at port 99999": ({"RAY_ADDRESS": "localhost:99999"}, ()),
    "a Ray with a password": ({"RAY_ADDRESS": "http://user:hunter2@127.0.0.1:9"}, ()),
    "a Ray with escape sequences": ({"RAY_ADDRESS": "\x1b[2J"}, ()),
}
for _name, (_env, _options) in DOCTORS.items():
    add("environment", f"doctor with {_name}", partial(examined, _env, _options))


def placed(out: str, code: Any, home: Home) -> Asked:
    return Asked(("train", "own.toml", "--out", out.format(root=home.root)), code)


OUTS = {
    "a file": ("{root}/raykd_script.py", (2, 5)),
    "/dev/null": ("/dev/null", (2, 5)),
    "a loop of links": ("{root}/loop", (2, 5)),
    "a NUL": ("{root}/a\0b", (2, 5)),
}


def placed_in_loop(out: str, code: Any, home: Home) -> Asked:
    (home.root / "loop").symlink_to("loop")
    return placed(out, code, home)


for _name, (_out, _code) in OUTS.items():
    add("environment", f"results in {_name}", partial(placed_in_loop, _out, _code))


@hostile("environment")
def results_in_a_name_with_signs(home: Home) -> Asked:
    """The tracker's file lies in --out, whatever signs its name holds."""
    run = home.run()
    out = home.root / "a%20b?x=1#y"
    home.out.rename(out)

    def check(home: Home, _done: Done) -> list[str]:
        beside = [
            path.name for path in home.root.iterdir() if path.name.startswith("a") and path != out
        ]
        own = [] if (out / "mlflow.db").exists() else ["no mlflow.db in --out"]
        return own + [f"{name} is new, beside --out" for name in beside]

    return Asked(("track", "sync", out / run.name, "--uri", _own_uri(out)), 0, check=check)


def _own_uri(out: Path) -> str:
    from raykd.tracking import mlflow_mirror

    return mlflow_mirror.default_uri(out)


def closed(redirection: str, argv: tuple[str, ...], home: Home) -> Asked:
    return Asked(
        tuple(str(home.out) if part == "OUT" else part for part in argv),
        0,
        fresh=redirection,
    )


CLOSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "stdin and stdout closed while training": ("<&- >&-", ("train", "own.toml", "--out", "OUT")),
}
for _name, (_redirection, _argv) in CLOSED.items():
    add("environment", _name, partial(closed, _redirection, _argv))


@hostile("environment")
def a_full_stdout(home: Home) -> Asked:
    return Asked(("techniques",), (0, 5), fresh=">/dev/full")


@hostile("environment")
def a_cache_that_is_a_file(home: Home) -> Asked:
    (home.run() / "report.json").unlink()
    return home.asked(
        "report", "done.toml", code=(0, 5), env={"RAYKD_CACHE": str(home.root / "raykd_script.py")}
    )


@hostile("environment")
def a_cache_of_everybody(home: Home) -> Asked:
    shutil.rmtree(home.run() / "arms")  # what trains reads the node's copy of the store
    folder = home.root / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    return home.asked(
        "train", "done.toml", code=5, words="RAYKD_CACHE", env={"RAYKD_CACHE": str(folder)}
    )


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "no verb of ours": (("distil",), "distil"),
    "a verb with escape sequences": (("\x1b[2J\x07",), ""),
    "a verb of a million letters": (("x" * 100_000,), ""),
    "no recipe": (("run",), "RECIPE"),
    "two recipes": (("check", "own.toml", "done.toml"), "done.toml"),
    "an option of nobody": (("check", "own.toml", "--\x1b[2J"), ""),
    "hours of a text": (("store", "gc", "rows", "--older-than", "\x1b[2J"), "--older-than"),
    "a set without a value": (("check", "own.toml", "--set", "\x1b[2J"), "--set"),
    "a run folder as a recipe": (("check", "rows"), "rows"),
}


def used(argv: tuple[str, ...], words: str, home: Home) -> Asked:
    return Asked(argv, 2, (words,) if words else ())


for _name, (_argv, _words) in USAGE.items():
    add("usage", _name, partial(used, _argv, _words))
