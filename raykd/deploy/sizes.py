"""What the bytes of an ONNX student are, and what rounding did to each of its tensors."""

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from raykd.deploy.onnx.write import operators
from raykd.quant.embedding import QuantEmbedding
from raykd.quant.other_parameters import Stored, stored
from raykd.quant.swap import QuantLayer, roundable

CODES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def tensors_of(module: nn.Module) -> list[dict[str, Any]]:
    """One row for each rounded tensor: its name, shape, kind, bytes of codes and scales, and error.

    error = |W - Q(W)| / |W| in Frobenius norms, with W the weights that training kept in full
    precision.
    """
    operator = operators(module)
    values = {parametrisation: value for value, parametrisation in stored(module)}
    rows: list[dict[str, Any]] = []
    listed: set[nn.Module] = set()
    for name, layer in roundable(module):
        if layer.quant is None or operator[layer] in listed:  # a tied parameter is stored once
            continue
        listed.add(operator[layer])
        if isinstance(layer, Stored):
            value = values[layer]
            rounded = layer(value)
            kind = "int8, stored"
        else:
            value = layer.weight
            rounded = layer.rounded()
            kind = _kind(layer)
        sizes = {
            buffer: tensor.nbytes
            for buffer, tensor in operator[layer].named_buffers()
            if buffer != "bias"
        }
        rows.append(
            {
                "name": name.replace("parametrizations.", "").removesuffix(".0"),
                "shape": list(value.shape),
                "kind": kind,
                "bytes": sizes,
                "error": _error(value, rounded),
            }
        )
    return rows


def bytes_of(data: bytes, tensors: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of an ONNX file by kind: codes, scales, float32 and graph.

    float32 are biases, norms and whatever is not rounded. `tensors` are those of `tensors_of`.
    """
    proto = onnx.ModelProto.FromString(data)
    sizes = [(tensor.data_type, len(tensor.raw_data)) for tensor in proto.graph.initializer]
    codes = sum(size for kind, size in sizes if kind in CODES)
    scales = sum(row["bytes"]["scales"] for row in tensors)
    floats = sum(size for kind, size in sizes if kind == onnx.TensorProto.FLOAT) - scales
    return {
        "codes": codes,
        "scales": scales,
        "float32": floats,
        "graph": len(data) - codes - scales - floats,
    }


def _kind(layer: QuantLayer) -> str:
    """What a layer is rounded to, and how many weights share a scale."""
    quant = layer.quant
    assert quant is not None
    is_table = isinstance(layer, QuantEmbedding)
    whole = quant.per == "tensor" and not is_table
    shared = layer.weight.numel() if whole else quant.columns(layer.weight.shape[1])
    return f"{quant.embeddings if is_table else quant.weights}, a scale for {shared:,}"


@torch.no_grad()
def _error(value: Tensor, rounded: Tensor) -> float:
    size = float(value.float().norm())
    return float((value - rounded).float().norm()) / size if size else 0.0
