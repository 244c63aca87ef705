"""Checkpoints: one safetensors file each, whose name holds its step and its own digest. No pickle.

A state is copied where it is, and written on a thread while the training goes on: aside, then
renamed. A file whose content does not match its name is passed over with a warning, and the one
before it is used.
"""

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raykd.console import say
from raykd.errors import InfraError, RaykdError, StoreError
from raykd.files import faults
from raykd.training import state_file
from raykd.training.arm import World
from raykd.training.state_file import HEX

NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.safetensors")


@dataclass(frozen=True)
class Choice:
    """Which state a training goes on from."""

    step: int
    digest: str


@dataclass(frozen=True)
class Kept(Choice):
    """A state as it was read."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def name_of(choice: Choice) -> str:
    """The file that holds a state."""
    return f"step-{choice.step:08d}-{choice.digest}.safetensors"


class Checkpoints:
    """The newest few states of one training, in one folder.

    One thread writes, one state at a time. `stalled` are the seconds that its caller stood still.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self.keep = keep
        self.stalled = 0.0
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None  # of the thread, until it is told

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        settled: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy one state, and begin to write it; then all but the newest `keep` are dropped.

        `settled` are tensors in this process's memory that nothing will change, and that are not
        copied. The state before it is waited for: errors as in `check`.
        """
        self.wait()
        with self._standing():
            whole = {**state_file.on_host(tensors), **(settled or {})}
            self.thread = threading.Thread(target=self._write, args=(step, whole, meta))
            self.thread.start()

    def check(self) -> None:
        """Raise what went wrong with the state that was last written: InfraError of a disk."""
        error = self.error
        self.error = None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until no state is being written; errors as in `check`."""
        with self._standing():
            if self.thread is not None:
                self.thread.join()
                self.thread = None
        self.check()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it states are saved, of which the last is waited for at its end.

        Another error than that of a state goes first.
        """
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.wait()
            raise
        self.wait()

    @contextmanager
    def _standing(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stalled += time.perf_counter() - started

    def _write(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """What the thread does."""
        try:
            faults.point("checkpoint", step=step, at="before_write")
            state_file.write(self.folder, f"step-{step:08d}", tensors, meta)
            faults.point("checkpoint", step=step, at="written")
            for _, path in self._found()[self.keep :]:
                path.unlink(missing_ok=True)
        except RaykdError as error:
            self.error = error
        except OSError as error:
            self.error = InfraError(
                f"{self.folder}: {error.strerror}, the checkpoint of step {step} could not be "
                "written; mend that disk and give the same command, which continues from the one "
                "before it"
            )
        except Exception as error:
            self.error = error

    def choose(self, world: World, device: torch.device) -> "Choice | None":
        """The newest sound state of rank 0, which every rank has and goes on from; None for none.

        StoreError on every rank where one does not have just that state; it names their nodes.
        """
        chosen = self.newest() if world.rank == 0 else None
        if world.size == 1:
            return Choice(chosen.step, chosen.digest) if chosen else None
        told = torch.zeros(1 + HEX, dtype=torch.int64, device=device)
        if chosen:
            told[0] = chosen.step
            told[1:] = torch.tensor(list(chosen.digest.encode()), device=device)
        dist.broadcast(told, src=0)
        step, *letters = told.tolist()
        choice = Choice(step, bytes(letters).decode()) if any(letters) else None
        lacks = choice is not None and self.load(choice) is None
        nodes = world.told(socket.gethostname() if lacks else "", device)
        if any(nodes):
            raise StoreError(
                f"{self.folder}: rank 0 goes on from step {step}, and the checkpoint is not what "
                f"it is there on {', '.join(sorted(set(filter(None, nodes))))}; all nodes must "
                "share --out"
            )
        return choice

    def load(self, choice: "Choice") -> "Kept | None":
        """The state that was chosen; None where it is absent or damaged here."""
        return self._read(choice.step, self.folder / name_of(choice))

    def newest(self) -> "Kept | None":
        """The newest state whose digest is right, or None."""
        for step, path in self._found():
            kept = self._read(step, path)
            if kept:
                return kept
            say("train", f"checkpoint {path} is damaged; trying the one before it")
        return None

    def _read(self, step: int, path: Path) -> "Kept | None":
        digest = path.stem.rpartition("-")[2]
        try:
            found = state_file.digest_of(path)
        except FileNotFoundError:
            return None
        return Kept(step, digest, *state_file.read(path)) if found == digest else None

    def clear(self) -> None:
        """Remove every state, when the training is done, and what a killed process left of one."""
        self.wait()
        for _, path in self._found():
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".step-*.tmp"):
            path.unlink(missing_ok=True)

    def _found(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob("step-*.safetensors") if self.folder.is_dir() else ()
        named = [(m, p) for p in paths if (m := NAME.fullmatch(p.name))]
        return sorted(((int(m[1]), p) for m, p in named), reverse=True)
