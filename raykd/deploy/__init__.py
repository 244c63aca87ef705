"""The student as files that run elsewhere, each held against the trained student.

`load_artefact`, `unpack_artefact`, `Decoder` and `StreamReader` read what an export wrote.
"""

from raykd.deploy.artefact import load_artefact, unpack_artefact
from raykd.deploy.onnx.decoder import Decoder
from raykd.deploy.onnx.stream import StreamReader

__all__ = ["Decoder", "StreamReader", "load_artefact", "unpack_artefact"]
