"""One text that a language model reads token by token: the protocol, and a Llama with its cache."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from raykd.errors import DataError
from raykd.models.llama import Llama


class Reader(Protocol):
    """A causal language model in the middle of one text, of at most `steps` tokens."""

    steps: int

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read S more tokens -> logits (S, V) of what follows each."""
        ...

    def rollback(self, length: int) -> None:
        """Keep the first `length` tokens. DataError if there are fewer."""
        ...


class TorchReader:
    """A Llama and a cache for one text, with the dtype and device of its weights."""

    def __init__(self, module: Llama):
        self.steps = module.settings["steps"]
        self._module = module
        self._cache = module.cache(1)
        weight = module.lm_head.weight
        self._cache.keys = self._cache.keys.to(weight)
        self._cache.values = self._cache.values.to(weight)

    @property
    def length(self) -> int:
        return self._cache.length

    def rollback(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise DataError(
                f"rollback: {length} tokens, but {self.length} have been read; "
                f"keep 0 to {self.length}"
            )
        self._cache.length = length

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self._cache.keys.device)
        return self._module(ids, self._cache)["logits"][0]
