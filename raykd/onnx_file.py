"""A student as one ONNX file that stock onnxruntime executes: the trained codes and scales, never rounded again.

    int8             DynamicQuantizeLinear, MatMulInteger, times the scales
    int4, ternary    com.microsoft MatMulNBits of 4 or 2 bits, codes from a zero point of 8 or 2
    everything else  as it is

MatMulNBits computes with float activations, or rounds them itself, block by block, where the student was trained with
int8 activations (accuracy_level 4).
"""

import io
import logging
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.quant.layers import QuantLinear, quantised
from raykd.quant.pack import pack
from raykd.quant.scheme import BITS, Quant

OPSET = 21
BLOCK = 32  # inputs to a block of MatMulNBits where all of an output's share a scale
MICROSOFT = "com.microsoft::MatMulNBits"


class MatMulInteger(nn.Module):
    """An int8 layer: activations rounded over their whole tensor, products of integers, one multiplication after."""

    codes: Tensor  # (K, N) int8
    scales: Tensor  # (N,)
    bias: Tensor | None

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.outputs = layer.out_features
        self.register_buffer("codes", layer.codes().T.contiguous())
        self.register_buffer("scales", layer.scales()[:, 0].clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.onnx.ops
        types, shapes = (torch.uint8, torch.float32, torch.uint8), (x.shape, (), ())
        xq, scale, zero = ops.symbolic_multi_out("DynamicQuantizeLinear", (x,), dtypes=types, shapes=shapes, version=11)
        shape = (*x.shape[:-1], self.outputs)
        total = ops.symbolic("MatMulInteger", (xq, self.codes, zero), dtype=torch.int32, shape=shape, version=10)
        y = total.float() * (scale * self.scales)
        return y if self.bias is None else y + self.bias


class MatMulNBits(nn.Module):
    """An int4 or ternary layer: packed codes in blocks of inputs, a scale each; the last block is filled with zeros."""

    codes: Tensor  # (N, blocks, block bits / 8) uint8
    scales: Tensor  # (N, blocks)
    bias: Tensor | None

    def __init__(self, layer: QuantLinear, quant: Quant):
        super().__init__()
        outputs, inputs = layer.weight.shape
        scales = layer.scales()
        block = inputs // scales.shape[1] if scales.shape[1] > 1 else BLOCK
        count = -(-inputs // block)
        codes = np.zeros((outputs, count * block), np.int8)
        codes[:, :inputs] = layer.codes().numpy()
        bits = BITS[quant.weights]
        self.attributes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
        self.attributes["accuracy_level"] = 4 if quant.activations == "int8" else 1
        packed = pack(codes, bits).reshape(outputs, count, -1)
        self.register_buffer("codes", torch.from_numpy(packed))
        self.register_buffer("scales", scales.expand(outputs, count).contiguous().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.attributes["N"])
        found = torch.onnx.ops.symbolic(
            MICROSOFT, (x, self.codes, self.scales), attrs=self.attributes, dtype=torch.float32, shape=shape, version=1
        )
        return found if self.bias is None else found + self.bias


class Answers(nn.Module):
    """A module's logits, and its valence if it has a value head, in that order."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        said = self.module(inputs)
        if isinstance(said, Tensor):
            return said
        return (said["logits"], said["valence"]) if said.get("valence") is not None else said["logits"]


def to_onnx(module: nn.Module, example: Tensor) -> bytes:
    """The file of a module with QuantLinears, for inputs like `example` (B, T, K) of any number of rows.

    The module is taken over: its layers become what the runtime executes. RecipeError where it can not be exported.
    """
    wanted = Counter(_emit(module))
    with torch.no_grad():
        said = Answers(module).eval()(example)
    names = ["logits", "valence"] if isinstance(said, tuple) else ["logits"]
    sink = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            made = torch.onnx.export(
                Answers(module).eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["inputs"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=65536)},),
                verbose=False,
            )
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"export: {type(module).__name__} can not be written as ONNX: {first}") from error
    assert made is not None
    proto = _bare(made.model_proto)
    found = Counter(n.op_type for n in proto.graph.node if n.op_type in ("MatMulNBits", "MatMulInteger"))
    assert found == wanted, f"{dict(found)} nodes for {dict(wanted)} layers"
    sink.write(proto.SerializeToString())
    return sink.getvalue()


def _emit(module: nn.Module) -> list[str]:
    """Replace every layer that is rounded by its operator; their names, one a layer."""
    kinds = []
    for name, layer in list(quantised(module)):
        if layer.quant is None:
            continue
        emitted = MatMulInteger(layer) if layer.quant.weights == "int8" else MatMulNBits(layer, layer.quant)
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, emitted)
        kinds.append(type(emitted).__name__)
    return kinds


def _bare(proto: Any) -> Any:
    """The model without what exporters say about themselves: most of a small file."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    for graph in [proto.graph, *proto.functions]:
        graph.doc_string = ""
        del graph.metadata_props[:]
        del graph.value_info[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    return proto
