"""Whether a model fits into memory, before it is made."""

from collections.abc import Callable

import torch
from torch import nn

from raykd.files.memory import memory_bytes


def check_size(make: Callable[[], nn.Module]) -> None:
    """ValueError if the module that `make` gives would not fit into memory; none is made."""
    with torch.device("meta"):
        module = make()
    wanted = sum(value.numel() * value.element_size() for value in module.parameters())
    if wanted > memory_bytes():
        raise ValueError(
            f"its parameters would take {wanted / 2**30:,.0f} GiB, and there are "
            f"{memory_bytes() / 2**30:,.1f} GiB of memory"
        )
