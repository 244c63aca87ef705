"""The operators that execute rounded layers, each as a module whose trace is its ONNX nodes.

    int8, "int8"         DynamicQuantizeLinear, MatMulInteger, times the scales
    int8, "int8_token"   a row's max|x| / 127, MatMulInteger, times the row's scale and the scales
    int4, ternary        com.microsoft MatMulNBits of 4 or 2 bits, from a zero point of 8 or 2
    embeddings           com.microsoft GatherBlockQuantized of 8, 4 or 2 bits, from 128, 8 or 2
    rest = "int8"        Cast of the codes and Mul by their scales, which onnxruntime does once,
                         when it loads (before a MatMul, DequantizeLinear would make it round
                         activations that nobody asked it to)

The first column is a Quant's weights, and its activations for int8 ones. MatMulNBits computes with
float activations (accuracy_level 1), or rounds them block by block (4) if the student was trained
with int8 activations.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raykd.quant import other_parameters
from raykd.quant.embedding import QuantEmbedding
from raykd.quant.linear import QuantLinear
from raykd.quant.pack import pack
from raykd.quant.rounding import LEAST
from raykd.quant.swap import QuantLayer
from raykd.recipe.quant import BITS, Quant

OPSET = 23  # the first with Attention, which is some twenty nodes otherwise
OPERATORS = ("MatMulInteger", "MatMulNBits", "GatherBlockQuantized")


def operator_of(layer: QuantLayer) -> nn.Module:
    """What executes a layer that has a Quant."""
    assert layer.quant is not None
    if isinstance(layer, QuantEmbedding):
        return GatherBlockQuantized(layer, layer.quant)
    return (
        MatMulInteger(layer, layer.quant)
        if layer.quant.weights == "int8"
        else MatMulNBits(layer, layer.quant)
    )


class MatMulInteger(nn.Module):
    """An int8 layer: activations rounded over the tensor or each row, integer products, scales."""

    codes: Tensor  # (K, N) int8
    scales: Tensor  # (N,)
    bias: Tensor | None

    def __init__(self, layer: QuantLinear, quant: Quant):
        super().__init__()
        self.outputs = layer.out_features
        self.by_row = quant.activations == "int8_token"
        self.register_buffer("codes", layer.codes().T.contiguous())
        self.register_buffer("scales", layer.scales()[:, 0].clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale, *operands = self._of_rows(x) if self.by_row else self._of_all(x)
        shape = (*x.shape[:-1], self.outputs)
        total = torch.onnx.ops.symbolic(
            "MatMulInteger", operands, dtype=torch.int32, shape=shape, version=10
        )
        # By row the products go one after the other: of scale * scales onnxruntime 1.32 makes a
        # MatMulIntegerToFloat, which answers wrongly where x has three dimensions.
        if self.by_row:
            y = total.float() * scale * self.scales
        else:
            y = total.float() * (scale * self.scales)
        return y if self.bias is None else y + self.bias

    def _of_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST)
        return scale, (x / scale).round().to(torch.int8), self.codes

    def _of_all(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (x,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, (), ()),
            version=11,
        )
        return scale, codes, self.codes, zero


class MatMulNBits(nn.Module):
    """An int4 or ternary layer: packed codes in blocks of inputs, with a scale each.

    The last block is filled with zeros.
    """

    codes: Tensor  # (N, blocks, block bits / 8) uint8
    scales: Tensor  # (N, blocks)
    bias: Tensor | None

    def __init__(self, layer: QuantLinear, quant: Quant):
        super().__init__()
        outputs, inputs = layer.weight.shape
        scales = layer.scales()
        block = quant.block(inputs)
        count = -(-inputs // block)
        codes = np.zeros((outputs, count * block), np.int8)
        codes[:, :inputs] = layer.codes().numpy()
        bits = BITS[quant.weights]
        self.attributes: dict[str, Any] = {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": block,
            "accuracy_level": 4 if quant.activations == "int8" else 1,
        }
        packed = pack(codes, bits).reshape(outputs, count, -1)
        self.register_buffer("codes", torch.from_numpy(packed))
        self.register_buffer("scales", scales.expand(outputs, count).contiguous().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.attributes["N"])
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales),
            attrs=self.attributes,
            dtype=torch.float32,
            shape=shape,
            version=1,
        )
        return y if self.bias is None else y + self.bias


class GatherBlockQuantized(nn.Module):
    """A rounded table: packed codes in blocks of a row, with a scale each.

    The last byte of a row is filled with zeros.
    """

    codes: Tensor  # (V, D' bits / 8) uint8
    scales: Tensor  # (V, G)

    def __init__(self, layer: QuantEmbedding, quant: Quant):
        super().__init__()
        rows, self.width = layer.weight.shape
        bits = BITS[quant.embeddings]
        in_byte = 8 // bits  # codes of a byte
        codes = np.zeros((rows, -(-self.width // in_byte) * in_byte), np.int8)
        codes[:, : self.width] = layer.codes().numpy()
        # The operator takes blocks of a power of two, which may be longer than a row.
        whole = max(16, 1 << (self.width - 1).bit_length())
        block = quant.group if quant.columns(self.width) < self.width else whole
        self.attributes: dict[str, Any] = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "block_size": block,
            "bits": bits,
        }
        self.register_buffer("codes", torch.from_numpy(pack(codes, bits)))
        self.register_buffer("scales", layer.scales().clone())
        self.stored = codes.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        rows = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (self.codes, ids, self.scales),
            attrs=self.attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.stored),
            version=1,
        )
        return rows if self.stored == self.width else rows[..., : self.width]


class Unfolded(nn.Module):
    """A parameter stored as int8: codes times the scale of each slice of its first dimension.

    It is one unknown operator until the tracer, which folds constants, is done. Then `write` makes
    it two.
    """

    codes: Tensor  # (N, ...) int8
    scales: Tensor  # (N, 1, ...)

    def __init__(self, value: Tensor):
        super().__init__()
        codes, scales = other_parameters.codes_and_scales(value)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.reshape(-1, *[1] * (value.dim() - 1)))

    def forward(self, value: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "raykd::Unfolded",
            (self.codes, self.scales),
            dtype=torch.float32,
            shape=value.shape,
            version=1,
        )
