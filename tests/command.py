"""The command line in processes of its own, forked from a server that has imported torch: each
starts at once.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import child

ROOT = Path(__file__).parents[1]
PATIENT = {  # a busy machine's Ray starts late, and answers late
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_timeout_ms": "60000",
}
TRUSTED = (
    "_MANIFEST.json",
    "arm.json",
    "tune.json",
    "manifest.json",
    "report.json",
    "*.parquet",
    "*.safetensors",
)


@dataclass(frozen=True)
class Done:
    """What a finished command said, and its exit code (minus the signal that killed it)."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    """A command under way; what it says goes to two files."""

    process: BaseProcess
    folder: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, limit_s: float = 600) -> Done:
        self.process.join(limit_s)
        ended = not self.process.is_alive()
        self.process.kill()
        done = Done(
            self.process.exitcode, *((self.folder / name).read_text() for name in ("out", "err"))
        )
        assert ended, f"still running after {limit_s} s:\n{done.err}"
        return done


def start(folder: Path, *argv: object, cwd: Path = ROOT, **environment: str) -> Running:
    """`raykd ARGV` in a process that writes what it says into a new folder below `folder`."""
    own = folder / f"command-{time.monotonic_ns()}"
    own.mkdir(parents=True)
    return Running(
        child.start(_main, [str(a) for a in argv], str(own), str(cwd), **environment), own
    )


def raykd(folder: Path, *argv: object, cwd: Path = ROOT, **environment: str) -> Done:
    """`raykd ARGV`, carried out."""
    return start(folder, *argv, cwd=cwd, **environment).wait()


def until(true: Callable[[], Any], limit_s: float = 600) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"not so within {limit_s} s"
        time.sleep(0.05)


def in_workers(environment: dict[str, str]) -> dict[str, str]:
    """What gives an environment to the workers of a job on a running cluster, as `ray job submit`
    hands it on.
    """
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": environment}})}


def trained(out: Path) -> dict[str, bytes]:
    """The weights of every arm under `out`."""
    return {
        path.parent.name: path.read_bytes()
        for path in sorted(out.rglob("arms/*/weights.safetensors"))
    }


def left_in(out: Path) -> list[str]:
    """Files under `out` that a later run would take for done work."""
    return [str(path) for name in TRUSTED for path in out.rglob(name)]


def _main(argv: list[str], folder: str, cwd: str) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, and so would this
    from raykd.cli import main

    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        handle = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1 if name == "out" else 2)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    sys.argv = ["raykd", *argv]
    main()
