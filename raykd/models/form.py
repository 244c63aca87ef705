"""In which numbers a model is held, where, and how its attention is computed."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from raykd.errors import Problem, RecipeError
from raykd.recipe.precision import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
MAPS = ("attention", "scores")  # kinds of inner layers that attention in one call does not show


@runtime_checkable
class MayBeEager(Protocol):
    """A module that computes its attention step by step while this is True."""

    is_eager: bool


@dataclass(frozen=True)
class Form:
    """The type of a model's numbers, its device, its attention as `[precision]` says it, and
    whether a term reads that.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    attention: str = "auto"
    is_read: bool = False

    @classmethod
    def of_teacher(
        cls, precision: Precision, device: torch.device, layers: Iterable[str] = ()
    ) -> "Form":
        """A teacher's on `device`, of which the terms read the named inner layers."""
        return cls(DTYPES[precision.teacher], device, precision.attention, reads_maps(layers))

    @property
    def implementation(self) -> str:
        """Attention by the names of transformers.

        "auto" is step by step where it is read, and in fp32, as it was before there was a choice.
        """
        if self.attention != "auto":
            return self.attention
        return "eager" if self.is_read or self.dtype == torch.float32 else "sdpa"


def reads_maps(layers: Iterable[str]) -> bool:
    """Whether one of the inner layers, such as "scores.blocks.0", is a map of attention."""
    return any(name.partition(".")[0] in MAPS for name in layers)


def set_attention(module: nn.Module, attention: str) -> None:
    """Let a built-in model compute all attention step by step where that is asked for."""
    for part in module.modules():
        if isinstance(part, MayBeEager):
            part.is_eager = attention == "eager"


def set_matmul(precision: Precision) -> None:
    """Take up how this process multiplies matrices of fp32."""
    torch.set_float32_matmul_precision(precision.matmul)


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """While it is entered, a student's layers compute in the numbers that `[precision]` says."""
    if precision.student == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision.student])


def check_numbers(precision: Precision, device: torch.device) -> None:
    """RecipeError where a device has no bf16 and a model is to compute in it."""
    wanted: Mapping[str, str] = {"teacher": precision.teacher, "student": precision.student}
    problems = [
        Problem(
            f"precision.{key}",
            f'"bf16", which {_told(device)} does not have; write "fp32"'
            + (' or "fp16"' if key == "teacher" else ""),
        )
        for key, numbers in wanted.items()
        if numbers == "bf16" and not has_bf16(device)
    ]
    if problems:
        raise RecipeError(problems)


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 by itself; any CPU does, slowly where it has no unit."""
    if device.type != "cuda":
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _told(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the device {device}"
    return torch.cuda.get_device_name(device)
