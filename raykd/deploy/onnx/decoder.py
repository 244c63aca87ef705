"""A language model's ONNX file under onnxruntime, on one thread of a CPU: numpy in, numpy out."""

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
    """Reads `rows` texts token by token, or many tokens at a time.

    Keys and values go from call to call without a copy; the call after a rollback copies what is
    kept. With `lut`, onnxruntime multiplies 2-bit weights by its lookup tables. These round
    activations in a way of their own (differences up to 1e-2 of a layer's largest output). On x86
    they take 0.5 to 0.7 of the time with a scale for 32 inputs, but 1.1 to 1.7 with blocks of 128,
    so they are off by default.

    Example:
        >>> import numpy as np
        >>> from raykd.deploy import Decoder
        >>> from raykd.deploy.onnx import write_decoder
        >>> from raykd.models.llama import Llama
        >>> sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "inner": 32}
        >>> decoder = Decoder(write_decoder.to_onnx(Llama(classes=11, steps=12, **sizes)))
        >>> decoder.step(np.array([[3, 1, 4]])).shape
        (1, 3, 11)
        >>> decoder.length
        3
    """

    def __init__(self, file: Path | bytes, *, rows: int = 1, lut: bool = False):
        """StoreError if the file is no decoder's."""
        self._session = onnx_session.session(file, lut=lut)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        steps = self._session.get_modelmeta().custom_metadata_map.get("steps")
        if not steps or "tokens" not in shapes:
            raise StoreError(
                "this ONNX file does not decode; "
                "export a language model with raykd.deploy.onnx.write_decoder"
            )
        self.steps = int(steps)
        self.rows = rows
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
        """Forget every token; `rows` texts are read from now on, by default as many as before."""
        self.rows = rows or self.rows
        self._length = 0
        self._past = {name: self._empty(shape) for name, shape in self._shapes.items()}

    def rollback(self, length: int) -> None:
        """Keep the first `length` tokens. DataError if there are fewer."""
        if not 0 <= length <= self._length:
            raise DataError(
                f"rollback: {length} tokens, but {self._length} have been read; "
                f"keep 0 to {self._length}"
            )
        self._length = length

    def step(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """Read S more tokens of each row, integers (B, S) -> logits (B, S, V).

        DataError for another number of rows, for no tokens and for too many.
        """
        rows, count = tokens.shape
        if rows != self.rows or count < 1 or self._length + count > self.steps:
            raise DataError(
                f"tokens: {rows} rows of {count} after {self._length}; this decoder takes "
                f"{self.rows} rows, and {self.steps} tokens in all: "
                "make one for other rows, reset it, or roll it back"
            )
        feed = {f"past_{name}": self._kept(value) for name, value in self._past.items()}
        feed["tokens"] = onnx_session.value(tokens.astype(np.int64))
        logits, *past = self._session.run_with_ort_values(self._outputs, feed)
        self._past = dict(zip(self._shapes, past, strict=True))
        self._length += count
        return logits.numpy().copy()  # numpy() is a view that does not keep its value alive

    def generate(self, prompt: NDArray[np.integer], count: int) -> NDArray[np.int64]:
        """Read a prompt (B, S) -> the likeliest tokens after it (B, count), one after the other."""
        tokens = [self.step(prompt)[:, -1].argmax(-1)]
        while len(tokens) < count:
            tokens.append(self.step(tokens[-1][:, None])[:, -1].argmax(-1))
        return np.stack(tokens, 1)

    def _empty(self, shape: list[Any]) -> Any:
        _, heads, _, width = shape
        return onnx_session.value(np.zeros((self.rows, heads, 0, width), np.float32))

    def _kept(self, value: Any) -> Any:
        """A layer's keys or values of the tokens that have not been rolled back."""
        if value.shape()[2] == self._length:
            return value
        return onnx_session.value(value.numpy()[:, :, : self._length].copy())


class OnnxReader:
    """A decoder of one row as a `raykd.generation.reader.Reader`, which takes torch's tensors."""

    def __init__(self, decoder: Decoder):
        if decoder.rows != 1:
            raise DataError(
                f"decoder: made for {decoder.rows} rows, but one text is read; make one with rows=1"
            )
        self.steps = decoder.steps
        self._decoder = decoder

    @property
    def length(self) -> int:
        return self._decoder.length

    def rollback(self, length: int) -> None:
        self._decoder.rollback(length)

    def step(self, tokens: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._decoder.step(np.array([tokens], np.int64))[0])
