"""One text that a language model reads on: torch's with its cache, or an ONNX file's, under the
same four names.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raykd.deploy.onnx.decoder import Decoder
from raykd.errors import DataError
from raykd.models.llama import Llama


class Reader(Protocol):
    """A causal language model with one text so far, of at most `steps` tokens."""

    steps: int

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read S tokens on -> logits (S, V) of what follows each."""
        ...

    def rollback(self, length: int) -> None:
        """Keep the first `length` tokens. DataError if there are fewer."""
        ...


class TorchReader:
    """A Llama and a cache for one text, in its weights' type and place."""

    def __init__(self, module: Llama):
        self.steps = module.settings["steps"]
        self._module, self._cache = module, module.cache(1)
        weight = module.lm_head.weight
        self._cache.keys, self._cache.values = (
            self._cache.keys.to(weight),
            self._cache.values.to(weight),
        )

    @property
    def length(self) -> int:
        return self._cache.length

    def rollback(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise DataError(
                f"rollback: {length} tokens, but {self.length} have been read; keep 0 to {self.length}"
            )
        self._cache.length = length

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._module(torch.tensor([tokens], device=self._cache.keys.device), self._cache)[
            "logits"
        ][0]


class OnnxReader:
    """A decoder of one row, by torch's tensors."""

    def __init__(self, decoder: Decoder):
        if decoder.rows != 1:
            raise DataError(
                f"decoder: made for {decoder.rows} rows, but one text is read; make one with rows=1"
            )
        self.steps, self._decoder = decoder.steps, decoder

    @property
    def length(self) -> int:
        return self._decoder.length

    def rollback(self, length: int) -> None:
        self._decoder.rollback(length)

    def step(self, tokens: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._decoder.step(np.array([tokens], np.int64))[0])
