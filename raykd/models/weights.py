"""Weights into and out of a module, by the names that its state dict gives them."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.files.reading import MIB, opened
from raykd.models.form import Form
from raykd.quant.other_parameters import plain, plain_name

MOST_HEADER = 16 * MIB  # some 200,000 tensors
SHOWN = 8  # faults that an error lists
PLAIN_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
STORED = {"F16", "BF16", "F32", "F64"}  # the same as safetensors names them


def load_weights(module: nn.Module, path: Path, key: str, form: Form | None = None) -> None:
    """Fill `module` from a safetensors file.

    With a `form` the module may be without values: it takes the file's, in those numbers and on
    that device. RecipeError lists the tensors that are missing, extra, of another shape or of
    another kind of number; `key` is the table of the recipe that names the file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> save_file(weights_of(nn.Linear(3, 2)), path)
        >>> load_weights(nn.Linear(3, 2), path, "student")
    """
    tensors = read_tensors(path, f"{key}.weights", form)
    fill(module, tensors, f"{key}.weights {path}", are_taken=form is not None)


def read_tensors(path: Path, key: str, form: Form | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, its floats in the numbers of a `form`.

    RecipeError, which starts with `key`, if it is none.
    """
    try:
        _check_header(path)
        if form is None:
            return load_file(path)
        with safe_open(path, framework="pt", device=str(form.device)) as file:
            # one by one, so that no second copy of all of them is ever in memory
            return {name: _as_in(form, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RecipeError(f"{key} {path}: not a readable safetensors file: {error}") from None


def _as_in(form: Form, tensor: Tensor) -> Tensor:
    return tensor.to(form.dtype) if tensor.dtype in PLAIN_FLOATS else tensor


def numbers_in(files: Iterable[Path]) -> int:
    """How many numbers these safetensors files hold, by their headers."""
    count = 0
    for path in files:
        with safe_open(path, framework="np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        count += sum(math.prod(shape) for shape in shapes)
    return count


def _check_header(path: Path) -> None:
    """ValueError if a safetensors file is no regular file, or lists tensors beyond all reason."""
    with opened(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise ValueError(f"its header has {size:,} bytes, and {MOST_HEADER:,} are the most")


def check_stored(files: Iterable[Path]) -> None:
    """RecipeError if a `*.weight` in these safetensors files is stored as no plain float.

    For readers of other libraries, which would cast it.
    """
    faults = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
                kinds = {name: str(file.get_slice(name).get_dtype()) for name in names}
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"{path}: not a readable safetensors file: {error}") from None
        faults += [
            f"{path.name}: {name} is stored as {kind}; only {', '.join(sorted(STORED))} are read"
            for name, kind in sorted(kinds.items())
            if kind not in STORED
        ]
    if faults:
        raise RecipeError("weights that are no floats:\n  " + "\n  ".join(_shown(faults)))


def _shown(faults: list[str]) -> list[str]:
    """The first faults, and how many more there are."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return faults[:SHOWN] + more


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, on the CPU; a tied tensor appears once, under its first name.

    Example:
        >>> sorted(weights_of(torch.nn.Linear(3, 2)))
        ['bias', 'weight']
    """
    tensors = plain(module.state_dict())
    tied = _first_names(tensors)
    return {
        name: value.detach().cpu().contiguous()
        for name, value in tensors.items()
        if name not in tied
    }


def fill(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, *, are_taken: bool = False
) -> None:
    """Load exactly these tensors into `module`; where they `are_taken` it holds them themselves.

    RecipeError lists those that are missing, extra, of another shape or of another kind of number
    in the `source`. A tied tensor may appear once, under its first name.
    """
    state = plain(module.state_dict())
    tensors = dict(tensors)
    for name, first in _first_names(state).items():
        if first not in tensors:
            continue
        if name in tensors and not torch.equal(tensors[name], tensors[first]):
            raise RecipeError(
                f"{source}: {name} and {first} differ there, but the module ties them; "
                "set tied = false"
            )
        tensors.setdefault(name, tensors[first])
    faults = _misfits(state, tensors)
    if faults:
        listed = "\n  ".join(_shown(faults))
        raise RecipeError(f"{source} do not fit the module:\n  {listed}")
    names = {plain_name(name): name for name in module.state_dict()}
    tied = _tied_parameters(module) if are_taken else []
    values = {names[name]: value for name, value in tensors.items()}
    module.load_state_dict(values, assign=are_taken)
    for first, others in tied:
        for name in others:
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, module.get_parameter(first))


def _tied_parameters(module: nn.Module) -> list[tuple[str, list[str]]]:
    """The first name of each parameter that has several, with its others."""
    names: dict[int, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return [(found[0], found[1:]) for found in names.values() if len(found) > 1]


def _misfits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor that the module cannot take as it is."""
    faults = []
    for name in sorted(state.keys() | tensors.keys()):
        wanted = state.get(name)
        given = tensors.get(name)
        if wanted is None or given is None or wanted.shape != given.shape:
            faults.append(f"{name}: the module has {_shape(wanted)}, the file {_shape(given)}")
        elif not _is_same_kind(wanted.dtype, given.dtype):
            kinds = f"{_kind(wanted.dtype)}, the file {_kind(given.dtype)}"
            faults.append(f"{name}: the module has {kinds}; store it as the module has it")
    return faults


def _shape(value: Tensor | None) -> str:
    return "none" if value is None else str(tuple(value.shape))


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_same_kind(wanted: torch.dtype, given: torch.dtype) -> bool:
    """Whether a tensor can be taken without another meaning.

    Floats may be of any common width. Codes, flags and complex numbers would be cast in silence.
    """
    return wanted == given or {wanted, given} <= PLAIN_FLOATS


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tied tensor, by each of its other names."""
    first_of: dict[Any, str] = {}
    others = {}
    for name, value in tensors.items():
        if not value.numel():
            continue
        # without values there is no address
        at = value.untyped_storage()._cdata if value.is_meta else value.data_ptr()
        first = first_of.setdefault((at, value.shape), name)
        if first != name:
            others[name] = first
    return others
