"""torch's ONNX exporter, imported once, with one registry of operators for all exports of a process
and of those forked from it.

The exporter makes the registry, which nothing changes later, at every call: a third of what an
export of a small model costs.
"""

import functools
from contextlib import suppress

with suppress(ImportError, AttributeError):  # torch may keep them elsewhere one day
    from torch.onnx._internal.exporter import _core  # noqa: F401
    from torch.onnx._internal.exporter._registration import ONNXRegistry as Registry

    if not hasattr(Registry.from_torchlib, "cache_info"):
        Registry.from_torchlib = staticmethod(functools.cache(Registry.from_torchlib))
        Registry.from_torchlib()
