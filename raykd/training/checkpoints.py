"""Checkpoints: one safetensors file each, whose name holds its step and its own digest. No pickle.

A state is copied where it is, and written on a thread while the training goes on: aside, then
renamed. A file whose content does not match its name is passed over with a warning, and the one
before it is used.

A state that lies in parts on several workers is a file of each, and a table of them that is written
last. Any number of workers can read it, each what it needs.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from raykd.console import say
from raykd.errors import InfraError, RaykdError, StoreError
from raykd.files import faults
from raykd.files.atomic import write_bytes
from raykd.training import state_file
from raykd.training.arm import World
from raykd.training.state_file import HEX, Stored

NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.(?:safetensors|json)")
PART = re.compile(r"part-(\d{8})-.*\.safetensors")
OTHERS_S = 600  # for which the parts of the other workers are waited for
POLL_S = 0.02
LATE_S = 5  # the same where this worker has failed


@dataclass(frozen=True)
class Choice:
    """Which state a training goes on from."""

    step: int
    digest: str


@dataclass(frozen=True)
class Kept(Choice):
    """A state as it is read."""

    tensors: Stored
    meta: dict[str, Any]


@dataclass(frozen=True)
class Extent:
    """The rows of a tensor from `first` to before `last`."""

    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """Which of the files of a state a worker writes; `token` is that of this attempt."""

    number: int
    count: int
    token: str

    def stem(self, step: int) -> str:
        """The name of its file, without the digest."""
        return f"part-{step:08d}-{self.token}-{self.number:05d}"


def name_of(choice: Choice) -> str:
    """The file that holds a state, where it is not in parts."""
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
        self.has_failed = threading.Event()  # this worker, whatever the others do
        self.error: Exception | None = None  # of the thread, until it is told

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        settled: Mapping[str, Tensor] | None = None,
        part: Part | None = None,
        extents: Mapping[str, Extent] | None = None,
    ) -> None:
        """Copy one state, and begin to write it; then all but the newest `keep` are dropped.

        `settled` are tensors in this process's memory that nothing will change, and that are not
        copied. With a `part` this is one worker's of the state, whose tensors have the rows that
        `extents` say. The state before it is waited for: errors as in `check`.
        """
        self.wait()
        with self._standing():
            whole = {**state_file.on_host(tensors), **(settled or {})}
            work = (step, whole, meta, part, extents or {})
            self.thread = threading.Thread(target=self._write, args=work)
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
            self.has_failed.set()
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

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        part: Part | None,
        extents: Mapping[str, Extent],
    ) -> None:
        """What the thread does."""
        try:
            faults.point("checkpoint", step=step, at="before_write")
            if part is None:
                state_file.write(self.folder, f"step-{step:08d}", tensors, meta)
                faults.point("checkpoint", step=step, at="written")
            else:
                first = {name: extent.first for name, extent in extents.items()}
                state_file.write(self.folder, part.stem(step), tensors, {"first": first})
                if part.number > 0:
                    return
                faults.point("checkpoint", step=step, at="before_table")
                self._write_table(step, meta, part)
            self._drop()
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

    def _write_table(self, step: int, meta: dict[str, Any], part: Part) -> None:
        """Write the table of a state's files, once all are there; it makes them a state."""
        names = self._parts_of(step, part)
        data = json.dumps({"meta": meta, "parts": names}).encode()
        digest = hashlib.sha256(data).hexdigest()[:HEX]
        write_bytes(self.folder / f"step-{step:08d}-{digest}.json", data)

    def _parts_of(self, step: int, part: Part) -> list[str]:
        """The names of all workers' files of a state, which are waited for."""
        ends = time.monotonic() + OTHERS_S
        while True:
            found = [
                path.name
                for number in range(part.count)
                for path in self.folder.glob(f"{replace(part, number=number).stem(step)}-*")
            ]
            if len(found) == part.count:
                return found
            if self.has_failed.is_set():
                ends = min(ends, time.monotonic() + LATE_S)
            if time.monotonic() > ends:
                raise InfraError(
                    f"{self.folder}: {len(found)} of {part.count} parts of the checkpoint of step "
                    f"{step} are there; all nodes must share --out, and have room"
                )
            time.sleep(POLL_S)

    def _drop(self) -> None:
        """Remove all states but the newest, and the parts that belong to none of these."""
        found = self._found()
        for _, path in found[self.keep :]:
            path.unlink(missing_ok=True)
        oldest = found[: self.keep][-1][0]
        for path in self.folder.glob("part-*"):
            match = PART.fullmatch(path.name)
            if match and int(match[1]) < oldest:
                path.unlink(missing_ok=True)

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
        lacks = choice is not None and self._of(choice, is_whole=False) is None
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
        return self._of(choice, is_whole=False)

    def newest(self) -> "Kept | None":
        """The newest state whose digest is right, or None."""
        for step, path in self._found():
            kept = self._read(step, path)
            if kept:
                return kept
            say("train", f"checkpoint {path} is damaged; trying the one before it")
        return None

    def _of(self, choice: "Choice", *, is_whole: bool) -> "Kept | None":
        path = self.folder / name_of(choice)
        if not path.exists():
            path = path.with_suffix(".json")
        return self._read(choice.step, path, is_whole=is_whole)

    def _read(self, step: int, path: Path, *, is_whole: bool = True) -> "Kept | None":
        """A state; unless it `is_whole` its parts are there, but their digests are not compared."""
        digest = path.stem.rpartition("-")[2]
        try:
            if state_file.digest_of(path) != digest:
                return None
            if path.suffix != ".json":
                stored = Stored([path])
                return Kept(step, digest, stored, stored.meta)
            table = json.loads(path.read_bytes())
            paths = [self.folder / name for name in table["parts"]]
            if is_whole and not all(state_file.is_sound(part) for part in paths):
                return None
            return Kept(step, digest, Stored(paths), table["meta"])
        except (FileNotFoundError, SafetensorError):
            return None

    def clear(self) -> None:
        """Remove every state, when the training is done, and what a killed process left of one."""
        self.wait()
        for _, path in self._found():
            path.unlink(missing_ok=True)
        for pattern in ("part-*.safetensors", ".step-*.tmp", ".part-*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _found(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob("step-*") if self.folder.is_dir() else ()
        named = [(m, p) for p in paths if (m := NAME.fullmatch(p.name))]
        return sorted(((int(m[1]), p) for m, p in named), reverse=True)
