"""A rounded student as a safetensors file for storage: codes packed, scales as trained.

    <layer>.codes     int8: I8 (N, K); int4: U8 (ceil(N K / 2),), two a byte;
                      ternary: U8 (ceil(N K / 5),), five a byte
    <layer>.scales    F32 (N, G)
    <tensor>.codes    I8 (N, ...), of what no layer rounds and rest = "int8" does,
                      with <tensor>.scales F32 (N,)
    anything else     by its name in the module's state; a parameter with several names, by the
                      first of them

Its metadata `layers` is the sha256 of what follows and of the tensors, a space, and the Quant of
every rounded layer as JSON. The same student gives the same bytes. Scales are stored and never
computed again: those of ternary weights would be smaller at each rounding.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from raykd.errors import StoreError
from raykd.quant import other_parameters
from raykd.quant.coded import FixedEmbedding, FixedLinear
from raykd.quant.pack import TRITS, pack, pack_trits, unpack, unpack_trits
from raykd.quant.swap import ROUNDABLE, quantised, replace
from raykd.recipe.quant import BITS, LEVELS, Quant

QUANTS = TypeAdapter(dict[str, Quant])


def write(module: nn.Module) -> bytes:
    """The file of a module whose layers have their Quants. The module is not changed."""
    layers = [
        (name, layer, layer.quant) for name, layer in quantised(module) if layer.quant is not None
    ]
    stored = {
        id(value)
        for value, parametrisation in other_parameters.stored(module)
        if parametrisation.quant
    }
    tensors: dict[str, Tensor] = {}
    for name, value in _others(module, [layer for _, layer, _ in layers]).items():
        if id(value) in stored:
            codes, scales = other_parameters.codes_and_scales(value)
            tensors[f"{name}.codes"] = codes
            tensors[f"{name}.scales"] = scales
        else:
            tensors[name] = value.detach()
    for name, layer, quant in layers:
        tensors[f"{name}.codes"] = _packed(layer.codes(), _kind(layer, quant))
        tensors[f"{name}.scales"] = layer.scales()
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach()
    assert all(layer.blend == 1 for _, layer, _ in layers), "rounding is still fading in"
    quants = {name: quant for name, _, quant in layers}
    return sealed(QUANTS.dump_json(quants, exclude={"__all__": {"skip"}}).decode(), tensors)


def sealed(layers: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The file of these Quants as JSON and these tensors, with their digest."""
    metadata = {"layers": f"{_digest(layers, tensors)} {layers}"}
    return save({name: value.contiguous().clone() for name, value in tensors.items()}, metadata)


def read(data: bytes, module: nn.Module) -> None:
    """Fill a module, as its model builds it, with the student in a file.

    Its rounded layers then hold their codes, and it answers bit for bit as the module that was
    written. StoreError, and an unchanged module, if the file is damaged or another model's.
    """
    layers, tensors = _opened(data)
    swaps: dict[nn.Module, nn.Module] = {}
    modules = dict(module.named_modules())
    for name, quant in layers.items():
        layer = modules.get(name)
        if not isinstance(layer, ROUNDABLE) or not name:
            raise StoreError(
                _unfit(f"{name}: the module has no linear layer or embedding of this name")
            )
        swaps[layer] = _fixed(name, layer, quant, tensors)
    others = _others(module, swaps)
    values = {name: _whole(tensors, name, value) for name, value in others.items()}
    if tensors:
        raise StoreError(_unfit(f"{min(tensors)}: the module has no such tensor"))
    with torch.no_grad():
        for name, value in others.items():
            value.copy_(values[name])
    replace(module, swaps)


def _others(module: nn.Module, rounded: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The module's state outside its rounded layers, each tensor once."""
    layers = set(rounded)
    owners = dict(module.named_modules(remove_duplicate=False))
    state = other_parameters.plain(module.state_dict(keep_vars=True))
    listed: set[int] = set()
    others: dict[str, Tensor] = {}
    for name, value in sorted(state.items()):
        if owners[name.rpartition(".")[0]] not in layers and id(value) not in listed:
            listed.add(id(value))
            others[name] = value
    return others


def _kind(layer: nn.Module, quant: Quant) -> str:
    """What the codes of a layer are: one of LEVELS, or "none"."""
    return quant.embeddings if isinstance(layer, nn.Embedding) else quant.weights


def _packed(codes: Tensor, kind: str) -> Tensor:
    if kind == "int8":
        return codes
    flat = codes.flatten().numpy()
    if kind == "ternary":
        return torch.from_numpy(pack_trits(flat))
    return torch.from_numpy(pack(np.pad(flat, (0, len(flat) % 2)), BITS[kind]))


def _unpacked(tensors: dict[str, Tensor], name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Codes of this shape, int8."""
    count = math.prod(shape)
    if kind == "int8":
        codes = _taken(tensors, name, torch.int8, shape)
    elif kind == "ternary":
        packed = _taken(tensors, name, torch.uint8, (-(-count // TRITS),))
        try:
            codes = torch.from_numpy(unpack_trits(packed.numpy(), count)).reshape(shape)
        except ValueError as error:
            raise StoreError(_unfit(f"{name}: {error}")) from None
    else:
        packed = _taken(tensors, name, torch.uint8, (-(-count // 2),))
        codes = torch.from_numpy(unpack(packed.numpy(), BITS[kind])[:count]).reshape(shape)
    if (codes < -LEVELS[kind]).any():
        raise StoreError(_unfit(f"{name}: codes below -{LEVELS[kind]}"))
    return codes


def _fixed(
    name: str, layer: nn.Linear | nn.Embedding, quant: Quant, tensors: dict[str, Tensor]
) -> nn.Module:
    """The layer that takes another's place; its tensors are taken out of `tensors`."""
    kind = _kind(layer, quant)
    rows, width = layer.weight.shape
    if kind == "none":
        raise StoreError(_unfit(f'{name}: an embedding, but its Quant has embeddings = "none"'))
    by_tensor = isinstance(layer, nn.Linear) and quant.per == "tensor"
    groups = 1 if by_tensor else width // quant.columns(width)
    codes = _unpacked(tensors, f"{name}.codes", kind, (rows, width))
    scales = _scales(tensors, name, (rows, groups))
    if isinstance(layer, nn.Embedding):
        return FixedEmbedding(codes, scales, layer.weight.dtype)
    bias = None
    if layer.bias is not None:
        bias = _taken(tensors, f"{name}.bias", layer.bias.dtype, tuple(layer.bias.shape))
    return FixedLinear(quant, codes, scales, bias)


def _whole(tensors: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    """A tensor outside the rounded layers, from its codes if the file has those."""
    shape = tuple(value.shape)
    if f"{name}.codes" not in tensors or len(shape) < 2:
        return _taken(tensors, name, value.dtype, shape)
    codes = _unpacked(tensors, f"{name}.codes", "int8", shape)
    return codes * _scales(tensors, name, shape[:1]).reshape(-1, *[1] * (len(shape) - 1))


def _scales(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    scales = _taken(tensors, f"{name}.scales", torch.float32, shape)
    if not (scales.isfinite() & (scales > 0)).all():
        raise StoreError(_unfit(f"{name}.scales: not all are finite and above 0"))
    return scales


def _taken(
    tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """A tensor, taken out of `tensors`. StoreError if it is not what the module needs."""
    if name not in tensors:
        raise StoreError(_unfit(f"{name}: missing"))
    tensor = tensors.pop(name)
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise StoreError(
            _unfit(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, the module asks {dtype} {shape}")
        )
    return tensor


def _opened(data: bytes) -> tuple[dict[str, Quant], dict[str, Tensor]]:
    """The Quants and the tensors of a file that is whole."""
    try:
        tensors = load(data)
        header = _json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        digest, _, layers = (header.get("__metadata__") or {})["layers"].partition(" ")
        if _digest(layers, tensors) != digest:
            raise ValueError("its digest is not the one it states")
        return QUANTS.validate_python(_json(layers)), tensors
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        reason = (
            f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        )
        raise StoreError(f"the packed student is damaged: {reason}; write it again") from None


def _json(text: str | bytes) -> Any:
    """A JSON value. ValueError if an object has a key twice, of which parsers take either."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("a key stands twice")
        return value

    return json.loads(text, object_pairs_hook=once)


def _digest(layers: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(layers.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unfit(what: str) -> str:
    return (
        f"the packed student does not fit the module: {what}; "
        "build the model that it was written from"
    )
