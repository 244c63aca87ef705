"""Tensors and a table as one safetensors file, hashed while it is written and named by its digest.

A tensor that has several names is in the file once. Nothing is copied on the way to the disk, and
the interpreter is left to other threads.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from raykd.files.atomic import whole_file

HEX = 16  # letters of a digest in a name
SUFFIX = ".safetensors"
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in this process's memory that nothing will change; a tied tensor is copied once.

    A device is waited for once, at the end.
    """
    made: dict[Any, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, value in tensors.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        key = place if value.numel() else name
        if key not in made:
            made[key] = value.detach().to("cpu", copy=True, non_blocking=True)
        copies[name] = made[key]
    if any(value.is_cuda for value in tensors.values()):
        torch.cuda.synchronize()
    return copies


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> str:
    """Write `<stem>-<digest>.safetensors` and give that name.

    Names that hold one tensor object share its bytes. InfraError where the disk is full.
    """
    first_of: dict[int, str] = {}
    same: dict[str, str] = {}
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        first = first_of.setdefault(id(value), name)
        if first == name:
            own[name] = value.contiguous()
        else:
            same[name] = first
    header: dict[str, Any] = {"__metadata__": {"meta": json.dumps(meta), "same": json.dumps(same)}}
    end = 0
    for name in sorted(own, key=lambda name: -own[name].element_size()):  # so that all are aligned
        value = own[name]
        start = end
        end += value.nbytes
        header[name] = {
            "dtype": KINDS[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()

    def name_of_it() -> str:
        return f"{stem}-{digest.hexdigest()[:HEX]}{SUFFIX}"

    with whole_file(folder / f"{stem}{SUFFIX}", name_of_it) as file:
        pieces = (_bytes_of(own[name]) for name in header if name != "__metadata__")
        for piece in (len(head).to_bytes(8, "little"), head, *pieces):
            digest.update(piece)
            file.write(piece)
    return name_of_it()


def _bytes_of(value: Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data


def digest_of(path: Path) -> str:
    """The digest that a file's name should end with."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:HEX]


def is_sound(path: Path) -> bool:
    """Whether a file's content has the digest that its name ends with."""
    return digest_of(path) == path.stem.rpartition("-")[2]


class Stored(Mapping[str, Tensor]):
    """The tensors of a state, whole or in parts in its files, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.at: dict[str, list[tuple[int, str, int]]] = {}  # (file, name there, first row)
        self.meta: dict[str, Any] = {}
        for number, file in enumerate(self.files):
            texts = file.metadata() or {}
            meta = json.loads(texts["meta"])
            self.meta = self.meta or meta  # of the first file
            same = json.loads(texts.get("same", "{}"))  # of before there was any: none
            first = meta.get("first", {})
            for name in [*file.keys(), *same]:
                place = (number, same.get(name, name), first.get(name, 0))
                self.at.setdefault(name, []).append(place)

    def __getitem__(self, name: str) -> Tensor:
        pieces = [self.files[number].get_tensor(there) for number, there, _ in self.at[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """The rows of a tensor from `first` to before `last`."""
        pieces: list[Tensor] = []
        for number, there, begin in self.at[name]:
            piece = self.files[number].get_slice(there)
            low = max(first - begin, 0)
            high = min(last - begin, piece.get_shape()[0])
            if low < high:
                pieces.append(piece[low:high])
        if not pieces:
            number, there, _ = self.at[name][0]
            return self.files[number].get_slice(there)[:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.at)

    def __len__(self) -> int:
        return len(self.at)
