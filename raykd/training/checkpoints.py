"""Checkpoints: one safetensors file each, whose name holds its step and its own digest. No pickle.

A file is written aside and renamed; a file whose content does not match its name is passed over
with a warning, and the one before it is used.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from raykd.console import say
from raykd.files.atomic import write_bytes

NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.safetensors")


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
        digest = hashlib.sha256(data).hexdigest()[:16]
        write_bytes(self.folder / f"step-{step:08d}-{digest}.safetensors", data)
        for _, path in self._found()[self.keep :]:
            path.unlink(missing_ok=True)

    def newest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """(step, tensors, meta) of the newest state whose digest is right, or None."""
        for step, path in self._found():
            if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.rpartition("-")[2]:
                say("train", f"checkpoint {path} is damaged; trying the one before it")
                continue
            with safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
                return step, tensors, json.loads((file.metadata() or {})["meta"])
        return None

    def clear(self) -> None:
        """Remove every state, when the training is done."""
        for _, path in self._found():
            path.unlink(missing_ok=True)

    def _found(self) -> list[tuple[int, Path]]:
        paths = self.folder.glob("step-*.safetensors") if self.folder.is_dir() else ()
        named = [(m, p) for p in paths if (m := NAME.fullmatch(p.name))]
        return sorted(((int(m[1]), p) for m, p in named), reverse=True)
