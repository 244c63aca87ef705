"""Checkpoints: one safetensors file each, whose name holds its step and its own digest. No pickle.

A file is written aside and renamed; a file whose content does not match its name is passed over
with a warning, and the one before it is used.
"""

import hashlib
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from raykd.console import say
from raykd.errors import StoreError
from raykd.files.atomic import write_bytes
from raykd.training.arm import World

NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.safetensors")
HEX = 16  # letters of a digest in a name


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
    """The newest few states of one training, in one folder."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write one state, then drop all but the newest `keep`."""
        data = save(
            {k: v.clone().contiguous() for k, v in tensors.items()}, {"meta": json.dumps(meta)}
        )
        choice = Choice(step, hashlib.sha256(data).hexdigest()[:HEX])
        write_bytes(self.folder / name_of(choice), data)
        for _, path in self._found()[self.keep :]:
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
            found = hashlib.sha256(path.read_bytes()).hexdigest()[:HEX]
        except FileNotFoundError:
            return None
        if found != digest:
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
            meta = json.loads((file.metadata() or {})["meta"])
        return Kept(step, digest, tensors, meta)

    def clear(self) -> None:
        """Remove every state, when the training is done."""
        for _, path in self._found():
            path.unlink(missing_ok=True)

    def _found(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob("step-*.safetensors") if self.folder.is_dir() else ()
        named = [(m, p) for p in paths if (m := NAME.fullmatch(p.name))]
        return sorted(((int(m[1]), p) for m, p in named), reverse=True)
