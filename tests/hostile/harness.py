"""What a hostile input is, where it may and may not reach, and the command that it is tried with.

Every input has a folder of its own: `here`, where the command is given; `victim`, which nothing may
read into its results, write or delete; `installed`, whose modules could be imported but are not the
user's; `out`, the only place for results. A module that must not run writes its name into `canary`.
"""

import atexit
import fcntl
import gc
import hashlib
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import child

from raykd import cli

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
MIB = 1 << 20
CPU_S = 20  # of one command
MESSAGE_BYTES = 3000
SECRET = "the-victim's-secret"
BIDI = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
PLANT = """
import os
with open(os.environ["CANARY"], "a") as file:
    file.write(__name__ + "\\n")
def rows(**settings):
    return []
def build(**settings):
    raise TypeError("planted")
"""
RAYKD = "from raykd.cli import main\nmain()\n"
NEEDED = (  # by the commands, imported once for all of them
    "raykd.stages.plan",
    "raykd.stages.doctor",
    "raykd.reports.compare",
    "raykd.orchestration.training",
    "onnxruntime",
    "pandas",
    "sqlalchemy.orm",
    "tokenizers",
    "transformers",
)


@dataclass(frozen=True)
class Done:
    """What a command said, and its exit code: minus a signal, None where it had no end."""

    code: int | None
    out: str
    err: str
    peak_mib: int | None = None  # of memory, beyond what the process began with


Check = Callable[["Home", Done], Iterable[str]]


@dataclass(frozen=True)
class Asked:
    """A command with a hostile input, and what must come of it.

    `code` are the exit codes that are documented, `words` what stderr must name. `fresh` starts a
    new interpreter, as a shell does, with the redirections of that text. `check` gives what else is
    wrong afterwards. No file may grow beyond `most_bytes`. `then` is tried after it, without that.
    """

    argv: tuple[Any, ...]
    code: int | tuple[int, ...]
    words: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    fresh: str | None = None
    check: Check | None = None
    limit_s: float = 120
    most_bytes: int | None = None
    then: "Asked | None" = None


@dataclass(frozen=True)
class Home:
    """The folders of one input. `finished` holds a run that is done, `texts` a recipe over text."""

    root: Path
    finished: Path
    texts: Path

    @property
    def here(self) -> Path:
        return self.root / "here"

    @property
    def victim(self) -> Path:
        return self.root / "victim"

    @property
    def installed(self) -> Path:
        return self.root / "lib" / "site-packages"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def canary(self) -> Path:
        return self.root / "canary"

    def prepare(self) -> None:
        """Make a user's folder with sound recipes, a victim, and modules that must not run."""
        shutil.copytree(self.finished / "here", self.here)
        (self.victim / "deep").mkdir(parents=True)
        (self.victim / "secret.txt").write_text(SECRET)
        (self.victim / "deep" / "keep.bin").write_bytes(bytes(64))
        old = time.time() - 30 * 24 * 3600
        for path in self.victim.rglob("*"):
            os.utime(path, (old, old))
        self.installed.mkdir(parents=True)
        (self.installed / "planted.py").write_text(PLANT)
        (self.installed / "planted_pkg").mkdir()
        (self.installed / "planted_pkg" / "__init__.py").write_text(PLANT)
        recipe = 'RECIPE = {"terms": {"ce": {}}}'
        technique = f'"""A planted technique."""\n{PLANT}\n{recipe}\n'
        (self.installed / "planted_pkg" / "technique.py").write_text(technique)
        (self.root / "raykd_script.py").write_text(RAYKD)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of `here`."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self) -> Path:
        """A finished run of done.toml under `out`, copied there."""
        shutil.copytree(self.finished / "out", self.out, symlinks=True, dirs_exist_ok=True)
        return next(self.out.glob("done-*"))

    def store(self) -> Path:
        """The teacher store of that run."""
        self.run()
        return next(path for path in (self.out / "stores").iterdir() if path.is_dir())

    def text(self) -> None:
        """A recipe over text whose teacher is the folder `wide`, put in place of the others."""
        shutil.rmtree(self.here)
        shutil.copytree(self.texts, self.here)
        path = self.here / "recipe.toml"
        path.write_text(path.read_text().replace(f"{self.texts}/", ""))

    def asked(self, verb: str, recipe: Any, *sets: str, code: Any, **rest: Any) -> Asked:
        """A verb over a recipe of `here`, results in `out`."""
        options = [part for text in sets for part in ("--set", text)]
        words = rest.pop("words", ())
        argv = (verb, recipe, "--out", self.out, *rest.pop("options", ()), *options)
        return Asked(argv, code, (words,) if isinstance(words, str) else tuple(words), **rest)


INPUTS: dict[str, Callable[[Home], Asked]] = {}


def hostile(kind: str) -> Callable[[Callable[[Home], Asked]], Callable[[Home], Asked]]:
    """Register a function as an input of a kind, under its own name."""

    def register(function: Callable[[Home], Asked]) -> Callable[[Home], Asked]:
        add(kind, function.__name__.replace("_", " ").strip(), function)
        return function

    return register


def add(kind: str, name: str, function: Callable[[Home], Asked]) -> None:
    """Register an input of a kind."""
    key = f"{kind}-{name}"
    assert key not in INPUTS, key
    INPUTS[key] = function


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def snapshot(home: Home) -> dict[str, str]:
    """Everything below an input's folder that no command may change, by path."""
    found: dict[str, str] = {}
    for folder in (home.here, home.victim, home.installed):
        for where, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in [*folders, *files]:
                path = Path(where, name)
                found[str(path.relative_to(home.root))] = _described(path)
    return found


def _described(path: Path) -> str:
    told = path.lstat()
    if stat.S_ISLNK(told.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(told.st_mode):
        return f"mode {told.st_mode:o}"
    if told.st_size > MIB:
        return f"{told.st_size} bytes, written {told.st_mtime_ns}"
    return sha256(path.read_bytes())


class Nest:
    """A process that has imported everything once, and forks itself for each command.

    What a command changes in its process, such as modules, threads and limits, ends with it.
    """

    def __init__(self) -> None:
        self.ours, theirs = multiprocessing.Pipe()
        self.process = child.start(_serve, theirs)
        theirs.close()
        self.cpu_s = 0.0

    def carry_out(self, home: Home, asked: Asked) -> Done:
        """The command, in a process with bounds on its time and memory."""
        argv = [str(part) for part in asked.argv]
        env = {"CANARY": str(home.canary), **asked.env}
        places = (str(home.here), str(home.installed))
        self.ours.send((argv, *places, env, asked.limit_s, asked.most_bytes))
        done, cpu_s = self.ours.recv()
        self.cpu_s += cpu_s
        return done

    def close(self) -> None:
        self.ours.close()
        child.wait([self.process])


def carry_out(nest: Nest, home: Home, asked: Asked) -> Done:
    """The command, as its input asks for it."""
    if asked.fresh is None:
        return nest.carry_out(home, asked)
    argv = [str(part) for part in asked.argv]
    return _in_new_interpreter(home, argv, {"CANARY": str(home.canary), **asked.env}, asked)


def _serve(requests: Connection) -> None:
    """Carry out commands until nobody asks any more."""
    for name in NEEDED:
        with suppress(ImportError):  # of what is optional
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with suppress(EOFError):
        while True:
            *asked, limit_s, most_bytes = requests.recv()
            said = [_pipe() for _ in range(2)]
            pid = os.fork()
            if not pid:
                requests.close()
                _main([end for _, end in said], most_bytes, *asked)
            requests.send(_ended(pid, limit_s, [end for end, _ in said]))
            for end in chain(*said):
                os.close(end)


def _pipe() -> tuple[int, int]:
    """A pipe that holds all that a command says, so that nobody need read it meanwhile.

    Unlike a file it has room on a full disk.
    """
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, MIB)
    os.set_blocking(ours, False)
    return ours, theirs


def _ended(pid: int, limit_s: float, said: list[int]) -> tuple[Done, float]:
    """How a command ended, killed at its limit; and its seconds of CPU."""
    end = time.monotonic() + limit_s
    done, status, used = os.wait4(pid, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.005)
        done, status, used = os.wait4(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        _, _, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status) if done else None
    out, err = map(_all_in, said)
    own = resource.getrusage(resource.RUSAGE_SELF)
    peak_mib = (used.ru_maxrss - own.ru_maxrss) // 1024
    return Done(code, out, err, peak_mib), used.ru_utime + used.ru_stime


def _all_in(pipe: int) -> str:
    with suppress(BlockingIOError):
        return os.read(pipe, MIB).decode(errors="surrogateescape")
    return ""


def _main(
    said: list[int],
    most_bytes: int | None,
    argv: list[str],
    here: str,
    installed: str,
    env: dict[str, str],
) -> NoReturn:
    """The command in a process of its own, which ends as Python's interpreter does."""
    code = 70
    try:
        atexit._clear()
        os.environ.update(env)
        _bound()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, number, handle in zip((sys.stdout, sys.stderr), (1, 2), said, strict=True):
            os.dup2(handle, number)
            os.close(handle)
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.chdir(here)
        sys.path.append(installed)
        sys.dont_write_bytecode = True
        sys.argv = ["raykd", *argv]
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        cli.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os._exit(code)


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (4 * GIB, 4 * GIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _in_new_interpreter(home: Home, argv: list[str], env: dict[str, str], asked: Asked) -> Done:
    said = [home.root / name for name in ("said.out", "said.err")]
    paths = os.pathsep.join([str(ROOT), str(home.installed)])
    whole = os.environ | {
        "PYTHONPATH": paths,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(home.root / "raykd_script.py"), *argv]
    with said[0].open("wb") as out, said[1].open("wb") as err:
        process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {asked.fresh}', "sh", *command],
            cwd=home.here,
            env={k: v for k, v in (whole | env).items() if v != UNSET},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        try:
            code: int | None = process.wait(asked.limit_s)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
    return Done(code, _read(said[0]), _read(said[1]))


UNSET = "\0unset"  # an environment variable that a new interpreter is not given


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""


def faults(home: Home, asked: Asked, done: Done, before: dict[str, str]) -> list[str]:
    """Everything that is wrong with how a command took its input."""
    codes = asked.code if isinstance(asked.code, tuple) else (asked.code,)
    found = []
    if done.code is None:
        found.append(f"no end within {asked.limit_s} s")
    elif done.code not in codes:
        found.append(f"exit code {done.code}, not {' or '.join(map(str, codes))}")
    if "Traceback (most recent call last)" in done.err + done.out:
        found.append("a traceback")
    found += [f"{word!r} is not named" for word in asked.words if word not in done.err]
    if len(done.err.encode(errors="surrogateescape")) > MESSAGE_BYTES:
        found.append(f"{len(done.err):,} characters on stderr")
    if strange := _control_characters(done.err):
        found.append(f"control characters on stderr: {strange}")
    if done.code not in (0, None) and not done.err.strip() and asked.fresh in (None, ""):
        found.append("no message")
    if home.canary.exists():
        found.append(f"ran what it must not: {home.canary.read_text().split()}")
    found += _changes(before, snapshot(home))
    if _holds(home.out, SECRET):
        found.append("the victim's secret is in the results")
    return found + list(asked.check(home, done) if asked.check else ())


def _control_characters(text: str) -> list[str]:
    strange = {c for c in text if unicodedata.category(c) == "Cc" or c in BIDI} - {"\n", "\t"}
    return sorted(map(repr, strange))


def _changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    gone = [f"{name} is gone" for name in before.keys() - after.keys()]
    new = [f"{name} is new" for name in after.keys() - before.keys()]
    changed = [
        f"{name} is changed" for name in before.keys() & after.keys() if before[name] != after[name]
    ]
    return sorted(gone + new + changed)[:5]


def _holds(folder: Path, secret: str) -> bool:
    """Whether any file of a folder, links left alone, has a text in it."""
    for where, _, files in os.walk(folder):
        for name in files:
            path = Path(where, name)
            if stat.S_ISREG(path.lstat().st_mode) and secret.encode() in path.read_bytes():
                return True
    return False
