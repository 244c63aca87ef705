"""Whether a model fits into memory, before it is made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raykd.files.memory import memory_bytes

DRAWN = {"rand", "randn"}
CHANGED = {"mul", "mul_", "normal_", "trunc_normal_", "uniform_"}


def check_size(make: Callable[[], nn.Module]) -> None:
    """ValueError if the module that `make` gives would not fit into memory; none is made."""
    with without_values():
        module = make()
    wanted = sum(value.numel() * value.element_size() for value in module.parameters())
    if wanted > memory_bytes():
        raise ValueError(
            f"its parameters would take {wanted / 2**30:,.0f} GiB, and there are "
            f"{memory_bytes() / 2**30:,.1f} GiB of memory"
        )


@contextmanager
def without_values() -> Iterator[None]:
    """A module that is made here has no values yet, and takes no memory."""
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Tensors have shapes and no values, so nothing is drawn or scaled.

    On the device "meta" torch would import its compiler for that, which takes two seconds.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in DRAWN:
            return torch.empty(*args, **kwargs)
        if name in CHANGED:
            return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        return func(*args, **kwargs)
