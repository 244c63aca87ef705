"""A student as one ONNX file that stock onnxruntime executes: the trained codes and scales, never rounded again.

    int8             DynamicQuantizeLinear, MatMulInteger, times the scales
    int4, ternary    com.microsoft MatMulNBits of 4 or 2 bits, codes from a zero point of 8 or 2
    everything else  as it is

MatMulNBits computes with float activations (accuracy_level 1), or rounds them block by block (4) where the student was
trained with int8 activations.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.models.adapter import field
from raykd.quant.layers import QuantLinear, quantised, replace
from raykd.quant.pack import pack
from raykd.quant.scheme import BITS, Quant

OPSET = 21
OPERATORS = ("MatMulInteger", "MatMulNBits")
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
        scales, block = layer.scales(), quant.block(inputs)
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
        logits, valence = field(said, "logits"), field(said, "valence")
        assert logits is not None
        return logits if valence is None else (logits, valence)


def to_onnx(module: nn.Module, example: Tensor, *, most_steps: int | None = None) -> bytes:
    """The file of a module with QuantLinears, for inputs like `example` (B, T, K) of any number of rows.

    With `most_steps` the file takes any number of steps up to that, without it as many as the example has. The module
    is taken over: its layers become what the runtime executes. RecipeError where it can not be exported.
    """
    emitted = _emit(module)
    answers = Answers(module).eval()
    try:
        with slow_path(), torch.no_grad():
            calls, names = _called(answers, emitted, example)
            proto = _traced(answers, example, names, most_steps)
    except Exception as error:
        raise RecipeError(
            f"export: {type(module).__name__} can not be written as ONNX: {reason(error)}; "
            "write that part of it with operations that torch.onnx.export knows"
        ) from error
    nodes = [n for n in proto.graph.node if n.op_type in OPERATORS]
    found = Counter(node.op_type for node in nodes)
    assert found == calls, f"{dict(found)} nodes for {dict(calls)} calls of layers"
    dims = {v.name: v.type.tensor_type.shape.dim for v in [*proto.graph.input, *proto.graph.value_info]}
    if not all(dims[node.input[0]][-1].dim_value for node in nodes):  # the tracer takes any width
        raise RecipeError(
            f"export: {type(module).__name__} has layers whose width follows the number of steps; leave out most_steps"
        )
    return _bare(proto).SerializeToString()


def _emit(module: nn.Module) -> list[nn.Module]:
    """Replace every layer that is rounded by its operator, and give those."""
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in quantised(module):
        if layer.quant is not None:
            assert layer.blend == 1, f"{name} is still fading in"
            swaps[layer] = MatMulInteger(layer) if layer.quant.weights == "int8" else MatMulNBits(layer, layer.quant)
    replace(module, swaps)
    return list(swaps.values())


def _called(answers: Answers, emitted: list[nn.Module], example: Tensor) -> tuple[Counter[str], list[str]]:
    """How often each operator is called for one answer (a layer may be shared, or unused), and the answer's names."""
    calls: Counter[str] = Counter()
    hooks = [m.register_forward_pre_hook(lambda m, _: calls.update([type(m).__name__])) for m in emitted]
    said = answers(example)
    for hook in hooks:
        hook.remove()
    return calls, ["logits", "valence"] if isinstance(said, tuple) else ["logits"]


def _traced(answers: Answers, example: Tensor, names: list[str], most_steps: int | None) -> Any:
    free = {0: torch.export.Dim("rows", min=1, max=65536)}
    if most_steps:
        free[1] = torch.export.Dim("steps", min=1, max=most_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        made = torch.onnx.export(
            answers,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["inputs"],
            output_names=names,
            dynamic_shapes=(free,),
            verbose=False,
        )
    assert made is not None
    return made.model_proto


@contextmanager
def slow_path() -> Iterator[None]:
    """Without the fused path of torch's encoder layers, which reads their linear layers' weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def reason(error: BaseException) -> str:
    """What went wrong first, in a line."""
    while error.__cause__:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
