"""The running mean of a student's weights while it trains, as a better student than its last step.

    mean <- decay mean + (1 - decay) weights        after every step

It forgets a weight with a half-life of ln 2 / (1 - decay) steps (Polyak and Juditsky 1992 average
alike; with this decay: Tarvainen and Valpola 2017, arXiv 1703.01780).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raykd.training.pieces import put_rows
from raykd.training.state_file import Stored


class Average:
    """The mean of a module's parameters from now on, whole or in parts as they are.

    Buffers are the module's own.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.parameters = dict(module.named_parameters())
        self.means = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._follow = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take in the parameters as they are after a step."""
        weights = [value.detach() for value in self.parameters.values()]
        self._follow(list(self.means.values()), weights, 0)

    def restore(self, stored: Stored, prefix: str) -> None:
        """The means of a checkpoint, whose names begin with `prefix`."""
        put_rows(self.means, stored, prefix)

    def put(self) -> None:
        """Give the module its mean parameters."""
        _fill(self.parameters, self.means)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Within it the module has its mean parameters, and its own again afterwards."""
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.put()
        try:
            yield
        finally:
            _fill(self.parameters, own)


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in parameters.items():
        value.copy_(values[name])
