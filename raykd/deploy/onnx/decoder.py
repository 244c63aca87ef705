"""A language model's ONNX file as onnxruntime decodes with it, on one thread of a CPU: numpy in,
numpy out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.deploy.onnx import session as onnx_session
from raykd.errors import DataError, StoreError


class Decoder:
    """`rows` sequences that are read on token by token, or many at a time.

    The past is handed from call to call without a copy; after a rollback the next call copies what
    is kept. With `lut`, onnxruntime multiplies 2-bit weights by its lookup tables. Those round
    activations in a way of their own (differences up to 1e-2 of a layer's largest output), and on
    x86 take 0.5 to 0.7 of the time with a scale for 32 inputs, 1.1 to 1.7 with blocks of 128, so
    they are left off where nobody asks.
    """

    def __init__(self, file: Path | bytes, *, rows: int = 1, lut: bool = False):
        """StoreError if the file is no decoder's."""
        self._session = onnx_session.session(file, lut=lut)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        steps = self._session.get_modelmeta().custom_metadata_map.get("steps")
        if not steps or "tokens" not in shapes:
            raise StoreError(
                "this ONNX file does not decode; export a language model with raykd.deploy.onnx.write_decoder"
            )
        self.steps, self.rows = int(steps), rows
        self._shapes = {
            name.removeprefix("past_"): shape for name, shape in shapes.items() if name != "tokens"
        }
        self._outputs = ["logits", *self._shapes]
        self.reset()

    @property
    def length(self) -> int:
        """How many tokens of each row have been read."""
        return self._length

    def reset(self, rows: int | None = None) -> None:
        """Forget every token, and read so many rows from now on."""
        self.rows = rows or self.rows
        self._length, self._past = (
            0,
            {name: self._empty(shape) for name, shape in self._shapes.items()},
        )

    def rollback(self, length: int) -> None:
        """Keep the first `length` tokens. DataError if there are fewer."""
        if not 0 <= length <= self._length:
            raise DataError(
                f"rollback: {length} tokens, but {self._length} have been read; keep 0 to {self._length}"
            )
        self._length = length

    def step(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """Read integers (B, S) on; logits (B, S, V).

        DataError for other rows, none or too many tokens.
        """
        rows, count = tokens.shape
        if rows != self.rows or count < 1 or self._length + count > self.steps:
            raise DataError(
                f"tokens: {rows} rows of {count} after {self._length}; this decoder takes {self.rows} rows, and "
                f"{self.steps} tokens in all: make one for other rows, reset it, or roll it back"
            )
        feed = {f"past_{name}": self._kept(value) for name, value in self._past.items()}
        feed["tokens"] = onnx_session.value(tokens.astype(np.int64))
        logits, *past = self._session.run_with_ort_values(self._outputs, feed)
        self._past = dict(zip(self._shapes, past, strict=True))
        self._length += count
        return logits.numpy().copy()  # numpy() is a view that does not keep its value alive

    def generate(self, prompt: NDArray[np.integer], count: int) -> NDArray[np.int64]:
        """(B, count): the likeliest tokens one after the other, once the prompt (B, S) is read."""
        found = [self.step(prompt)[:, -1].argmax(-1)]
        while len(found) < count:
            found.append(self.step(found[-1][:, None])[:, -1].argmax(-1))
        return np.stack(found, 1)

    def _empty(self, shape: list[Any]) -> Any:
        _, heads, _, width = shape
        return onnx_session.value(np.zeros((self.rows, heads, 0, width), np.float32))

    def _kept(self, value: Any) -> Any:
        """A layer's keys or values of the tokens that have not been rolled back."""
        return (
            value
            if value.shape()[2] == self._length
            else onnx_session.value(value.numpy()[:, :, : self._length].copy())
        )


class OnnxReader:
    """A decoder of one row as a `raykd.generation.reader.Reader`: torch tensors in place of numpy."""

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
