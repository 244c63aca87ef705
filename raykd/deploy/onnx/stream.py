"""A series encoder's stream file under onnxruntime, on one thread of a CPU: numpy in, numpy out."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raykd.deploy.onnx import session as onnx_session
from raykd.errors import DataError, StoreError


class StreamReader:
    """Reads `rows` windows step by step, or many steps at a time.

    The state goes from call to call without a copy. A window ends after `steps` steps; `reset`
    starts the next one.

    Example:
        >>> import numpy as np
        >>> from raykd.deploy import StreamReader
        >>> from raykd.deploy.onnx import write_stream
        >>> from raykd.models.series_encoder import SeriesEncoder
        >>> encoder = SeriesEncoder(channels=3, classes=2, steps=8, width=8, layers=1, heads=2)
        >>> reader = StreamReader(write_stream.to_onnx(encoder))
        >>> reader.step(np.zeros((1, 2, 3)))["logits"].shape
        (1, 2, 2)
        >>> reader.length
        2
    """

    def __init__(self, file: Path | bytes, *, rows: int = 1):
        """StoreError if the file is no stream's."""
        self._session = onnx_session.session(file)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        steps = self._session.get_modelmeta().custom_metadata_map.get("steps")
        if not steps or "past_tail" not in shapes:
            raise StoreError(
                "this is not a streaming ONNX file; "
                "export a series encoder with [export] stream = true"
            )
        self.steps = int(steps)
        self.rows = rows
        self.channels = shapes["inputs"][2]
        self._shapes = {
            name.removeprefix("past_"): shape for name, shape in shapes.items() if name != "inputs"
        }
        self._outputs = ["logits", "valence", *self._shapes]
        self.reset()

    @property
    def length(self) -> int:
        """How many steps of each window have been read."""
        return self._length

    @property
    def state(self) -> dict[str, NDArray[np.float32]]:
        """A copy of what later steps need: tail (B, K, kernel - 1), and each layer's keys and
        values (B, H, P, D).
        """
        return {name: value.numpy().copy() for name, value in self._state.items()}

    def reset(self, state: dict[str, NDArray[np.float32]] | None = None) -> None:
        """Start a window, or continue from a state.

        DataError if the state is not one of `rows` rows of this file.
        """
        if state is None:
            state = {name: np.zeros(self._shape(name, 0), np.float32) for name in self._shapes}
        if state.keys() != self._shapes.keys():
            raise DataError(
                f"state: holds {', '.join(sorted(state))}, "
                f"this stream keeps {', '.join(self._shapes)}"
            )
        length = next(value.shape[2] for name, value in state.items() if name != "tail")
        for name, value in state.items():
            if value.shape != self._shape(name, length) or value.dtype != np.float32:
                raise DataError(
                    f"state: {name} is {value.dtype} {value.shape}, this stream of {self.rows} "
                    f"rows takes float32 {self._shape(name, length)}; "
                    "give the state of as many rows, from the same file"
                )
        if length > self.steps:
            raise DataError(
                f"state: of {length} steps, but a window ends after {self.steps}; reset the stream"
            )
        self._length = length
        self._state = {
            name: onnx_session.value(np.ascontiguousarray(value)) for name, value in state.items()
        }

    def step(self, inputs: NDArray[np.number]) -> dict[str, NDArray[np.float32]]:
        """Read S more steps, numbers (B, S, K) -> logits (B, S, C) and valence (B, S), float32.

        DataError for another number of rows or channels, for no steps and for too many. Nothing has
        been read then.
        """
        rows, count, channels = inputs.shape
        fits = (rows, channels) == (self.rows, self.channels)
        if not fits or count < 1 or self._length + count > self.steps:
            raise DataError(
                f"inputs: {inputs.shape} after {self._length} steps; this stream takes "
                f"{self.rows} rows of {self.channels} channels, and {self.steps} steps in all: "
                "make one for other rows, or reset it"
            )
        feed = {f"past_{name}": value for name, value in self._state.items()}
        feed["inputs"] = onnx_session.value(np.ascontiguousarray(inputs, np.float32))
        logits, valence, *kept = self._session.run_with_ort_values(self._outputs, feed)
        self._state = dict(zip(self._shapes, kept, strict=True))
        self._length += count
        # numpy() is a view that does not keep its value alive.
        return {"logits": logits.numpy().copy(), "valence": valence.numpy().copy()}

    def _shape(self, name: str, length: int) -> tuple[int, ...]:
        _, *rest = self._shapes[name]
        return (self.rows, *rest) if name == "tail" else (self.rows, rest[0], length, rest[2])
